"""Worked examples on the digits of scikit-learn, each held to its slow form.

``python -m vmapsafe.examples.NAME`` runs one, in seconds, on a CPU:

* ``attribution``: which training images a prediction comes from (TRAK);
* ``clipped_training``: training with clipped per-sample gradients;
* ``ntk``: the tangent kernel of a BatchNorm network, and regression with it;
* ``maml``: a network that learns new classes in a few steps;
* ``ensemble``: an ensemble trained in one vmap, running statistics included.

``python -m vmapsafe`` is another: wrong labels, found by the size of gradients. The
data and the network are in ``digits``. What is needed beyond torch is the extra
``[demo]``. Nothing in the library imports these files: they are there to be copied.
"""
