"""A report of what is unsafe in a model under vmap.

The map, bottom up:

``report``       the findings, and how they print
``trial``        runs of a copy of the model on an example
``check``        ``check``: the findings of the layers, and of the runs
``command``      ``python -m vmapsafe check``
"""
