"""A report of what is unsafe in a model under vmap.

The map, bottom up:

``report``       the findings, and how they print
``question``     which model is looked at, and how it will be called
``layers``       findings of the layers and their flags
``watch``        what happens while the modules of a model run
``trial``        runs of a copy of the model on an example
``outcomes``     findings of these runs
``check``        ``check``, the public function
``command``      ``python -m vmapsafe check``
"""
