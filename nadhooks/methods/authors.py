"""The authors' algorithm, as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objectives
from .estimators import normal, normalised_step, sigmoid
from .parts import Method, Output, Pass, Samples, Table


def nad(*, beta: float = 0.2, lr: float = 0.1, epochs: int = 21, batch: int = 16, output: Output = "softmax") -> Method:
    """Hu et al., ICCV 2021, as in the authors' findpath.py.

    One logit per unit, standard normal at the start; gate = sigmoid(logit). Loss of a task over L sites, with S the
    samples that the open network classifies correctly (a batch without any is skipped):
    (1/L) [CE(all samples) + Σ_l MSE(gated_l[S], open_l[S])] + beta (1/L) Σ_l mean(gate_l²).
    Step: logits −= lr · gradient / ‖gradient‖₂, the norm over one site. Only the class's own images are seen.

    Kept as it is, faults of the idea included: gates are soft while learning and made hard (> 0.5) afterwards, which
    opens a gap, and nothing punishes a sub-architecture that answers its class to everything. beta does not carry
    over between networks; the authors' values for ImageNet are 4.5 (VGG16), 0.02 (ResNet50, DenseNet121), 0.45 (DARTS).
    With output="sigmoid", CE is that of the task's own output, and correct is where it is above 0.
    """

    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> dict[str, Tensor]:
        tasks, sites = len(next(iter(gates.values()))), len(gates)
        correct = objectives.correct(teacher.outputs, samples.classes, output).nonzero()[:, 0]
        entropy = objectives.cross_entropy(student.outputs, samples.classes, output)
        # of all samples, though only the correct ones count: that is cheaper than to pick them out of every site
        distances = torch.stack([objectives.mse(student.sites[site], teacher.sites[site]) for site in gates]).sum(0)
        terms = {
            "cross-entropy": objectives.per_task(entropy, samples.rows, tasks) / sites,
            "distance": objectives.per_task(distances[correct], samples.rows[correct], tasks) / sites,
            "gates": beta * objectives.squared_gates(gates),
        }
        learns = torch.bincount(samples.rows[correct], minlength=tasks) > 0
        return {name: torch.where(learns, term, torch.zeros_like(term)) for name, term in terms.items()}

    options = {"beta": beta, "lr": lr, "epochs": epochs, "batch": batch}
    return Method(
        "nad", objective, sigmoid, normalised_step(lr), normal, "own", "zero", None, output=output, epochs=epochs,
        batch=batch, options=options | ({} if output == "softmax" else {"output": output}),
    )  # fmt: skip
