"""Whole programs to copy, on the digits of scikit-learn. Each checks its own result.

``python -m vmapsafe.examples.NAME`` runs one, in seconds, on a CPU. They need the extra
``[demo]``, and use only the public names of the library. The map:

``digits``            the data and the network
``wrong_labels``      ``python -m vmapsafe``: wrong labels, found by large gradients
``attribution``       which training images a prediction comes from (TRAK)
``many_processes``    the same by several processes, which fill one folder together
``tracin``            which training images helped, and which did harm (TracIn)
``selection``         a few images whose mean gradient is near that of all
``noise_scale``       the gradient noise scale, logged by the training steps
``ewc``               a second task learnt without forgetting the first (EWC)
``clipped_training``  training with clipped per-sample gradients
``ntk``               the tangent kernel of a BatchNorm network, and regression with it
``maml``              a network that learns new classes in a few steps
``ensemble``          an ensemble trained in one vmap, running statistics included
"""
