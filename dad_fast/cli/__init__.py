"""Commands of `dad-fast`, one file each: options, help and one call.

Imports neither torch nor numpy.
"""
