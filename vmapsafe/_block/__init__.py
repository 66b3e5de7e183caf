"""A block: the rules in force for some models, and the models as they were afterwards.

The map, bottom up:

``covered``      one model that a block covers, and its layers
``open_blocks``  which blocks are open, in this thread and in all
``switched``     the classes that modules have while a block covers them
``code``         what the code of a module's class does: assign buffers, normalise
``models``       how layers are found, switched and put back
``operators``    faster batching rules of operators, while a block is open
``backward``     code that runs in backward: in the blocks it was made in, or refused
``writes``       what a call writes, and which buffer of a model that is
``callers``      which layer makes a call
``covers``       ``covers``: whether a block makes a module safe
``scope``        one open block of one thread: which rules hold, for which layers
``refusals``     what torch's vmap refuses, and which of it a loop can run
``advice``       notes for errors of torch's vmap: which layer, and what to do
``loop``         ``fallback="loop"``: slices one after another, where vmap refuses
``vmap_safe``    ``vmap_safe``: a block as users write it
``batched``      ``batched``: functions of a batch, run on batches of one
"""
