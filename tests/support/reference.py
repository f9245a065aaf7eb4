"""NAdam as the paper and its implementations describe it, in float64, one parameter at a time.

Written from the formulas, not from shardopt: T. Dozat, "Incorporating Nesterov momentum into Adam",
2016, with torch's momentum schedule; Keras's, optax's and lucid's where they differ.
"""

import math

import numpy as np

DEFAULTS = {
    "lr": 2e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "momentum_decay": 4e-3,
    "decoupled_weight_decay": False,
    "maximize": False,
    "variant": "torch",
}


class PaperNAdam:
    """One parameter and its state."""

    def __init__(self, param, **hyper):
        self.hyper = DEFAULTS | hyper
        self.param = np.array(param, np.float64)
        self.exp_avg = np.zeros_like(self.param)
        self.exp_avg_sq = np.zeros_like(self.param)
        self.mu_product = 1.0
        self.t = 0

    def step(self, grad, **changed):
        """Take a step; ``changed`` are hyperparameters that hold from now on."""
        self.hyper |= changed
        grad = np.array(grad, np.float64)
        if self.hyper["maximize"]:
            grad = -grad
        self.t += 1
        {"lucid": self._lucid, "optax": self._optax}.get(self.hyper["variant"], self._torch)(grad)

    def _moments(self, grad, momentum):
        beta1, beta2 = self.hyper["betas"]
        self.exp_avg = beta1 * momentum + (1 - beta1) * grad
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * grad**2

    def _torch(self, grad):
        h, t, (beta1, beta2) = self.hyper, self.t, self.hyper["betas"]
        if h["variant"] == "keras":
            h = h | {"momentum_decay": 1.0, "decoupled_weight_decay": True}
        if h["decoupled_weight_decay"]:
            self.param = self.param - h["lr"] * h["weight_decay"] * self.param
        else:
            grad = grad + h["weight_decay"] * self.param
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * h["momentum_decay"])) for k in (t, t + 1))
        self.mu_product *= mu
        self._moments(grad, self.exp_avg)
        m_hat = mu_next * self.exp_avg / (1 - self.mu_product * mu_next)
        m_hat = m_hat + (1 - mu) * grad / (1 - self.mu_product)
        v_hat = self.exp_avg_sq / (1 - beta2**t)
        self.param = self.param - h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"])

    def _optax(self, grad):
        h, t, (beta1, beta2) = self.hyper, self.t, self.hyper["betas"]
        self._moments(grad, self.exp_avg)
        m_hat = beta1 * self.exp_avg / (1 - beta1 ** (t + 1)) + (1 - beta1) * grad / (1 - beta1**t)
        v_hat = self.exp_avg_sq / (1 - beta2**t)
        update = m_hat / (np.sqrt(v_hat) + h["eps"]) + h["weight_decay"] * self.param
        self.param = self.param - h["lr"] * update

    def _lucid(self, grad):
        h, t, (beta1, beta2) = self.hyper, self.t, self.hyper["betas"]
        grad = grad + h["weight_decay"] * self.param
        self._moments(grad, (1 - h["momentum_decay"]) * self.exp_avg)
        bc1, bc2 = 1 - beta1**t, 1 - beta2**t
        m_hat = beta1 * self.exp_avg / bc1 + (1 - beta1) / bc1 * grad
        denominator = np.sqrt(self.exp_avg_sq / bc2) + h["eps"]
        self.param = self.param - h["lr"] * math.sqrt(bc2) / bc1 * m_hat / denominator
