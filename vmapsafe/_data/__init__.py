"""A function of each batch of a data set, and its results in files.

The map, bottom up:

``checksums``    of rows and batches, and of two pieces from those of each
``npy``          one file of rows, which grows
``journal``      what one of several processes has finished
``folder``       results in files that grow, and that a later run continues
``batches``      what a batch holds: the inputs and the rest
``fingerprint``  what was asked, to compare with what a folder was begun with
``rest``         the batches of a loader that a folder lacks
``saving``       one run that fills a folder, by one process or by several
``over``         ``over``: the loop over a loader
"""
