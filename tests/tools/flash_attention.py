"""Inputs of softmax attention."""

import torch


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def qkv(*leading, rows=5, columns=7, dim=8, value_dim=8, dtype=torch.float32):
    shapes = ((rows, dim), (columns, dim), (columns, value_dim))
    return [normal(*leading, *shape, dtype=dtype).requires_grad_() for shape in shapes]


def starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(lengths_q=(3, 0, 4, 2), lengths_k=(5, 2, 4, 0), heads=(4, 2), value_dim=8):
    query = normal(sum(lengths_q), heads[0], 8).requires_grad_()
    key = normal(sum(lengths_k), heads[1], 8).requires_grad_()
    value = normal(sum(lengths_k), heads[1], value_dim).requires_grad_()
    lengths = (starts(*lengths_q), starts(*lengths_k), max(lengths_q), max(lengths_k))
    return [query, key, value], lengths
