"""Results as people read them: each function turns one result into something rich can draw.

Whatever comes out of a file (names, metadata, paths) goes through `shown`, so that it can neither
drive the terminal nor pass for something else.
"""
