"""The command line: ``main`` defines the commands, ``output`` writes their files, ``allocator`` sets how memory is kept.

The commands' own work is in the applications; nothing else of the library imports this folder.
"""
