"""Per-sample gradients and quantities of them, from one forward and one backward pass.

The map, bottom up:

``copies``       a sample's own copy of each parameter, wherever a forward reads one
``record``       one forward and backward that gives each layer's input and gradient
``chunks``       a few samples at a time
``turns``        one call at a time on a model
``processes``    results of several processes, put together
``parameters``   by which parameters to differentiate, and where they are in the model
``samples``      the model, the loss and the batch of a call, checked and bound
``quantities``   what can be wanted of the gradients: rows, norms, clipped sums
``sketch``       random projections
``out``          given memory for rows
``one_pass``     one call for one quantity: chunks, empty batches, processes
``per_sample``   the functions that users call
"""
