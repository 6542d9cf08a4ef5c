"""Operators that stay exact and fast when they are differentiated twice across tasks, one kind of layer a file."""
