"""A report of what is unsafe in a model under vmap.

The map, bottom up:

``finding``      one thing that was found
``table``        columns of text
``summary``      a page: what to do first, the modes, the findings
``details``      a table of all findings
``report``       what ``check`` returns
``question``     which model is looked at, and how it will be called
``layers``       findings of the layers and their flags
``watch``        what happens while the modules of a model run
``outside``      modules that a model calls and does not register
``trial``        runs of a copy of the model on an example
``outcomes``     findings of these runs
``check``        ``check``, the public function
``command``      ``python -m vmapsafe check``
"""
