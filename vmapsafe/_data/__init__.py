"""A function of each batch of a data set, and its results in files.

The map, bottom up:

``folder``       results in files that grow, and that a later run continues
``over``         ``over``: the loop over a DataLoader
"""
