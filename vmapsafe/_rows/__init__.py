"""Per-sample gradients and quantities of them, from one forward and one backward pass.

The way of a call: ``per_sample`` takes it, and ``turns`` lets it wait for other
threads. Then ``compute`` checks its arguments into ``samples``, and ``looks`` takes
some samples at a time. For these ``record`` runs the model in a block, and hands what
backward meets to parts of quantities (``vmapsafe/quantities``). The results of the
parts make up that of the call. Where the loss cannot be recorded, ``samples`` makes the
rows by ``vmap(grad)``. Where vmap refuses the model, ``plain`` makes them in a loop.

The map, bottom up:

``copies``       a sample's own copy of each parameter, wherever a forward reads one
``record``       one forward and backward that gives each layer's input and gradient
``merged``       the same as one batch, where every call treats samples alike
``layers``       the same for torch's own layers in a row, which need no watching
``traced``       the same while torch.compile traces
``chunks``       a few samples at a time
``turns``        one call at a time on a model
``parameters``   by which parameters to differentiate, and where they are in the model
``plain``        one sample's gradient by plain autograd
``samples``      the arguments of a call, checked and bound; rows by ``vmap(grad)``
``looks``        the gradients of all samples, for several quantities, in chunks
``out``          checks of ``out=``
``advice``       notes for errors: what to do about memory and devices
``compute``      one call: the ways to gradients, and several processes
``per_sample``   the functions that users call
"""
