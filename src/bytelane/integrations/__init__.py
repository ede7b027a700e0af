"""Doors into other libraries, each imported only by who needs it."""
