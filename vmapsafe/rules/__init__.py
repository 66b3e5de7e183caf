"""What the package knows of layers, one file for each family; importing registers it.

The map, bottom up:

``regimes``               from which sizes on a rule is faster, by type of device
``precision``             half precision is computed in float32
``memory``                large tensors of zeros, whose pages cost nothing until written
``products``              products of two matrices
``outer_products``        products of two vectors for each sample
``formulas``              rows of a parameter, and quantities of them without the rows
``opaque``                formulas that torch.compile does not look into
``kept_calls``            the table in which layers say what ``_rows`` keeps of a call
``alike``                 functions that treat the samples of a batch alike
``alike_shapes``          those of its shape
``alike_losses``          losses
``references``            slow forms of normalisation, to compare with
``normalisation``         norms by the input's statistics, right in every derivative
``layer_norm``            layer norm
``rms_norm``              RMS norm
``group_norm``            group norm
``running_statistics``    updates of running statistics
``batch_norm_operators``  the operators of batch norm
``batch_norm``            batch norm, in every mode but "sync"
``sync``                  batch norm across the vmapped axis
``instance_norm``         instance norm
``linear``                linear layers
``convolution_regimes``   which algorithm is the fastest for which convolution
``convolution``           convolutions
``embedding``             embeddings
``gates``                 the steps of recurrent layers
``through_time``          recurrent layers for per-sample gradients
``recurrent``             recurrent layers and cells
``gaussian_nll``          the Gaussian negative log likelihood
``attention``             scaled dot product attention
``buffers``               writes to buffers, which a forward in a block leaves out
``layouts``               memory formats that vmap cannot make or query
``random_numbers``        memory for random numbers

The rules:

* in "no_running_stats": batch_norm, statistics of the slice; instance_norm,
  statistics of the slice;
* in "group_norm": batch_norm, groups of channels;
* in "sync": batch_norm, statistics across the vmapped axis; instance_norm, running
  statistics across the vmapped axis;
* in every mode: batch_norm, layers that stay in eval mode; instance_norm, layers that
  stay in eval mode; batch_norm, statistics not written; batch_norm, running
  statistics; instance_norm, statistics not written; in-place write to a buffer, left
  out; memory of its own for each slice; and, because torch's own numbers are wrong or
  missing: batch_norm, a batch of one; instance_norm, all positions in one dimension;
  group_norm, where torch's own fails; layer_norm, where torch's own fails; rms_norm,
  where torch's own fails; gaussian_nll_loss, under transforms; lstm, under
  transforms; gru, under transforms; rnn_tanh, under transforms; rnn_relu, under
  transforms; lstm_cell, under transforms; gru_cell, under transforms; rnn_tanh_cell,
  under transforms; rnn_relu_cell, under transforms; data_ptr, of a recurrent layer's
  weights under transforms; packed sequences, refused under vmap; copy in another
  order, under vmap; is_contiguous in another order, under vmap; on CUDA: mm, outer
  products; bmm, outer products;
* for speed alone, turned off by ``fast=False``: convolution_backward, weights by
  matrix products; native_batch_norm, running statistics; native_batch_norm_backward,
  running statistics; native_batch_norm, statistics of the slice;
  native_batch_norm_backward, statistics of the slice; cudnn_batch_norm, running
  statistics; cudnn_batch_norm, statistics of the slice; cudnn_batch_norm_backward,
  statistics of the slice; native_layer_norm, batches merged;
  native_layer_norm_backward, batches merged; native_layer_norm_backward,
  differentiated again; attention on the CPU, batches merged; attention_backward on
  the CPU, batches merged; addmm, batches merged; embedding_dense_backward, into
  memory of zeros.
"""

from vmapsafe.rules import alike_losses as alike_losses
from vmapsafe.rules import alike_shapes as alike_shapes
from vmapsafe.rules import attention as attention
from vmapsafe.rules import batch_norm as batch_norm
from vmapsafe.rules import buffers as buffers
from vmapsafe.rules import convolution as convolution
from vmapsafe.rules import embedding as embedding
from vmapsafe.rules import gaussian_nll as gaussian_nll
from vmapsafe.rules import group_norm as group_norm
from vmapsafe.rules import instance_norm as instance_norm
from vmapsafe.rules import layer_norm as layer_norm
from vmapsafe.rules import layouts as layouts
from vmapsafe.rules import linear as linear
from vmapsafe.rules import outer_products as outer_products
from vmapsafe.rules import random_numbers as random_numbers
from vmapsafe.rules import recurrent as recurrent
from vmapsafe.rules import rms_norm as rms_norm
from vmapsafe.rules import sync as sync
