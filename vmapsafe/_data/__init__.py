"""A function of each batch of a data set, and its results in files.

The map, bottom up:

``folder``       results in files that grow, and that a later run continues
``batches``      what a batch holds: the inputs and the rest
``fingerprint``  what was asked, to compare with what a folder was begun with
``rest``         the batches of a loader that a folder lacks
``over``         ``over``: the loop over a loader
"""
