"""One integer linear layer beside the machine's limits and other runtimes: `bytelane bench linear`, which see.

python benchmarks/linear.py [--quick] [--threads 2] [--shapes 1536x6144] [--rows 1,16,128]
"""

import sys

from bytelane.cli import main

if __name__ == "__main__":
    main(["bench", "linear", *sys.argv[1:]])
