"""Per-sample gradients and quantities of them, from one forward and one backward pass.

The map, bottom up:

``formulas``     rows of a parameter, their norms and sums, from a layer's gradient
``copies``       a sample's own copy of each parameter, wherever a forward reads one
``record``       one forward and backward that gives each layer's input and gradient
``chunks``       a few samples at a time
``samples``      the model, the loss and the batch of a call, checked and bound
``turns``        one call at a time on a model
``processes``    results of several processes, put together
``grads``        ``per_sample_grads``
``norms``        ``per_sample_grad_norms`` and ``clipped_grad_sum``
``sketch``       ``per_sample_sketch``
"""
