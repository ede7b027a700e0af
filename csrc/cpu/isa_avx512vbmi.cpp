// The same source with VBMI: widths other than 2, 4 and 8 bits need no scratch memory on their way to a dot.
#include "isa_avx512vnni.cpp"
