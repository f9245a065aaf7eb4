"""Adam, AdamW and RAdam as their papers and implementations describe them, in float64.

Written from the formulas, not from shardopt: D. Kingma and J. Ba, "Adam: a method for stochastic
optimization", 2015; I. Loshchilov and F. Hutter, "Decoupled weight decay regularization", 2019;
L. Liu et al., "On the variance of the adaptive learning rate and beyond", 2020; and what torch,
optax, Keras and lucid make of them.
"""

import math

import numpy as np

from tests.support.reference import PaperNAdam

DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "maximize": False,
    "variant": "torch",
}


class PaperAdam:
    """One parameter and its state."""

    usual = DEFAULTS

    def __init__(self, param, **hyper):
        self.hyper = self.usual | hyper
        self.param = np.array(param, np.float64)
        self.exp_avg = np.zeros_like(self.param)
        self.exp_avg_sq = np.zeros_like(self.param)
        self.t = 0

    def step(self, grad, **changed):
        """Take a step; ``changed`` are hyperparameters that hold from now on."""
        self.hyper |= changed
        h, (beta1, beta2) = self.hyper, self.hyper["betas"]
        grad = np.array(grad, np.float64) * (-1 if h["maximize"] else 1)
        self.t += 1
        if h["decoupled_weight_decay"] or h["variant"] in ("keras", "optax"):
            self.param = self.param - h["lr"] * h["weight_decay"] * self.param
        else:
            grad = grad + h["weight_decay"] * self.param
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * grad
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * grad**2
        m_hat = self.exp_avg / (1 - beta1**self.t)
        self.param = self.param - h["lr"] * self.direction(m_hat)

    def direction(self, m_hat):
        """The update without the learning rate."""
        h, bc2 = self.hyper, 1 - self.hyper["betas"][1] ** self.t
        if h["variant"] in ("keras", "lucid"):
            return math.sqrt(bc2) * m_hat / (np.sqrt(self.exp_avg_sq) + h["eps"])
        return m_hat / (np.sqrt(self.exp_avg_sq / bc2) + h["eps"])


class PaperAdamW(PaperAdam):
    """Adam with decoupled weight decay."""

    usual = DEFAULTS | {"weight_decay": 1e-2, "decoupled_weight_decay": True}


class PaperRAdam(PaperAdam):
    """Rectified Adam."""

    def direction(self, m_hat):
        """The update without the learning rate."""
        h, t, beta2 = self.hyper, self.t, self.hyper["betas"][1]
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        shortest, eps = {"torch": 5, "optax": 5, "lucid": 4}[h["variant"]], h["eps"]
        if length <= shortest:
            return m_hat
        r = (length - 4) * (length - 2) * longest
        r = math.sqrt(r / ((longest - 4) * (longest - 2) * length))
        if h["variant"] == "torch":
            return r * m_hat * math.sqrt(1 - beta2**t) / (np.sqrt(self.exp_avg_sq) + eps)
        if h["variant"] == "lucid":
            r = r * math.sqrt(length)
        return r * m_hat / (np.sqrt(self.exp_avg_sq / (1 - beta2**t)) + eps)


PAPERS = {"NAdam": PaperNAdam, "Adam": PaperAdam, "AdamW": PaperAdamW, "RAdam": PaperRAdam}
