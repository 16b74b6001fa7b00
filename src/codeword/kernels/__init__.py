"""The inner loops that decide speed, each a pure function over arrays.

What is here is the NumPy reference. A native kernel replaces a function one for one, takes the same arrays and returns
the same bits; nothing outside this package may depend on which of the two ran.
"""
