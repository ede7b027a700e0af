"""The implementations that `bytelane.dispatch` chooses from, one module for each way of running them."""
