# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project

import torch
from torch import fx

from vllm.compilation.passes.inductor_pass import InductorPass

aten = torch.ops.aten


class SeparateResidualPass(InductorPass):
    """Takes sums with a residual stream out of the matrix products before them.

    Inductor makes one `addmm` of both, which begins by copying the residual. A separate
    sum is fused into the norm that follows. Sums with a bias are left in the `addmm`.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            residual, a, b = node.args
            if node.kwargs or residual.meta["val"].dim() < 2:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (residual, product))
            for part in (product, total):
                part.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
