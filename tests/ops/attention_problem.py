"""One attention call as a test needs it: inputs in a dtype, the exact results in float64, and the error rule on all of them."""

import itertools

import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.testing import assert_matches, make

FLAGS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_lower": {"is_causal": True, "alignment": "lower_right"},
    "window": {"window": (3, 5)},
    "window_lower": {"window": (20, 1), "alignment": "lower_right"},
    "bool_mask": {"mask": "bool"},
    "float_mask": {"mask": "float"},
    "mask_and_causal": {"mask": "bool", "is_causal": True, "alignment": "lower_right"},
    "key_padding": {"mask": "keys"},
    "row_bias": {"mask": "rows"},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True, "is_causal": True},
    "everything": {
        "softcap": 3.0,
        "alibi": True,
        "mask": "heads",
        "window": (30, 4),
        "alignment": "lower_right",
        "scale": -0.3,
    },
}
NAMES = ("out", "lse", "dq", "dk", "dv", "dmask")


class Problem:
    """sizes: B, Hq, Hkv, Sq, Sk, D, Dv. layout: one of LAYOUTS, or "heads_inside", where the heads of a token are adjacent."""

    def __init__(self, sizes, flags="plain", dtype=torch.float32, seed=0, layout="contiguous"):
        B, Hq, Hkv, Sq, Sk, D, Dv = sizes
        options = dict(FLAGS[flags])
        inside = layout == "heads_inside"
        layout = "contiguous" if inside else layout
        kind, alibi = options.pop("mask", None), options.pop("alibi", False)
        self.dtype, self.options = dtype, options
        self.q = make(B, Hq, Sq, D, dtype=dtype, seed=seed, layout=layout)
        self.k = make(B, Hkv, Sk, D, dtype=dtype, seed=seed + 100, layout=layout)
        self.v = make(B, Hkv, Sk, Dv, dtype=dtype, seed=seed + 200, layout=layout)
        shape = {
            None: None,
            "bool": (1, 1, Sq, Sk),
            "float": (B, 1, Sq, Sk),
            "keys": (B, 1, 1, Sk),
            "rows": (1, Hq, Sq, 1),
            "heads": (1, Hq, Sq, Sk),
        }[kind]
        self.mask = None
        if kind in ("bool", "keys"):
            self.mask = make(*shape, seed=seed + 300) > -0.5
        elif kind is not None:
            self.mask = make(*shape, dtype=dtype, seed=seed + 300)
        options["enable_gqa"] = Hq != Hkv
        options["alibi_slopes"] = make(Hq, seed=seed + 400).abs() if alibi else None
        self.grad_out = make(B, Hq, Sq, Dv, dtype=dtype, seed=seed + 500)
        self.grad_lse = make(B, Hq, Sq, dtype=torch.float64, seed=seed + 600)
        if inside:
            self.q, self.k, self.v, self.grad_out = (
                t.transpose(1, 2).contiguous().transpose(1, 2) for t in (self.q, self.k, self.v, self.grad_out)
            )

    def leaves(self):
        tensors = [self.q, self.k, self.v] + (
            [self.mask] if self.mask is not None and self.mask.dtype != torch.bool else []
        )
        return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]

    def run(self, backend="cpu", return_lse=True, with_grad_lse=True):
        """out, lse and the gradients, by the public function; layouts of the inputs are kept."""
        tensors = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.detach().requires_grad_()
            tensors.append(mask)
        result = bmk.attention(*tensors[:3], attn_mask=mask, return_lse=return_lse, backend=backend, **self.options)
        out, lse = result if return_lse else (result, None)
        outputs, grads = [out], [self.grad_out]
        if return_lse and with_grad_lse:
            finite = torch.isfinite(lse)
            outputs.append(torch.where(finite, lse, 0.0))
            grads.append(self.grad_lse.to(lse.dtype))
        return [
            out.detach(),
            lse if lse is None else lse.detach(),
            *torch.autograd.grad(outputs, tensors, grads, materialize_grads=True),
        ]

    def arguments(self, dtype=torch.float64):
        """The op's own arguments, in a wider dtype."""
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        return bmk.attention.prepare(*(t.to(dtype) for t in (self.q, self.k, self.v)), attn_mask=mask, **self.options)

    def exact(self, with_grad_lse=True):
        """The same in float64 by the reference, and for each result the sum of the sizes of its terms."""
        args = self.arguments()
        with torch.no_grad():
            out, lse = reference.fwd(*args)
            grad_lse = torch.where(torch.isfinite(lse), self.grad_lse, 0.0) if with_grad_lse else None
            mask_grad = self.mask is not None and self.mask.dtype != torch.bool
            grads = reference.bwd(self.grad_out.double(), grad_lse, out, lse, mask_grad, *args)
            # ds is a difference that cancels where little is attended to; its terms have the size p (|dp| + |delta|).
            p, _ = reference.probabilities(args[0], args[1], args[3], args[4], args[6], *args[8:12])
            heads = args[0].shape[1]
            k, v = (reference.expand_heads(t, heads) for t in (args[1], args[2]))
            grad = self.grad_out.double()
            terms = p * ((grad @ v.mT).abs() + (grad.abs() * out.abs()).sum(-1, keepdim=True))
            sizes = [
                p @ v.abs(),
                lse,
                abs(args[6]) * (terms @ k.abs()),
                abs(args[6]) * (terms.mT @ args[0].abs()),
                p.mT @ grad.abs(),
            ]
            if mask_grad:
                sizes.append(terms.sum_to_size(self.mask.shape))
        return [out, lse, *grads[: 4 if mask_grad else 3]], sizes

    def check(self, backend="cpu", baseline=True):
        """The error rule for out, lse and every gradient."""
        self.judge(self.run(backend), self.run(backend, with_grad_lse=False) if baseline else None)

    def judge(self, actual, plain=None):
        """The same for results found elsewhere; `plain` are those without a gradient to lse, for the comparison with PyTorch."""
        exact, sizes = self.exact()
        # PyTorch's own op has no lse: its gradients are compared where lse has none either.
        theirs = None
        if plain is not None and self.dtype != torch.float64 and exact[0].numel():
            theirs = self.run("torch", return_lse=False)
            plain_exact, _ = self.exact(with_grad_lse=False)
        for i, (name, a, e) in enumerate(zip(NAMES, actual, exact)):
            if i == 1:
                dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
                assert a.dtype == dtype
                assert torch.equal(torch.isinf(a), torch.isinf(e))
                a, e = a[torch.isfinite(e)], e[torch.isfinite(e)]
                # lse is a sum of a maximum and a logarithm, which may cancel.
                assert_matches(a, e, None, dtype=dtype, name=name, magnitude=1.0)
                continue
            if e.numel() == 0:
                continue
            rms, size = e.square().mean().sqrt().item(), sizes[i].square().mean().sqrt().item()
            cancels = size if rms < 0.05 * size else 0.0
            assert_matches(a, e, None, dtype=self.dtype, gradient=i > 1, magnitude=cancels, name=name)
            if theirs is not None:
                # The backward takes p = e^(s - lse) from the lse it was given: half a rounding step of lse is |lse| / 2 of p.
                finite = exact[1][torch.isfinite(exact[1])]
                steps = 1 + finite.abs().max().item() / 2 if i > 1 and finite.numel() else 1
                largest = sizes[i].max().item() * steps
                options = {
                    "dtype": self.dtype,
                    "gradient": i > 1,
                    "magnitude": largest,
                    "name": f"{name} against torch",
                }
                assert_matches(plain[i], plain_exact[i], theirs[i], **options)


class Sequences:
    """Some of them laid end to end, each a Problem of its own; lengths: (Sq, Sk) of each; sizes: Hq, Hkv, D, Dv."""

    def __init__(self, lengths, sizes, flags="plain", dtype=torch.float32, seed=0, layout="contiguous"):
        Hq, Hkv, D, Dv = sizes
        self.problems = [
            Problem((1, Hq, Hkv, *both, D, Dv), flags, dtype, seed + 1000 * b) for b, both in enumerate(lengths)
        ]
        self.cu_seqlens = [
            torch.tensor([0, *itertools.accumulate(n)], dtype=kind)
            for n, kind in zip(zip(*lengths), (torch.int32, torch.int64))
        ]
        self.longest = [max(n) for n in zip(*lengths)]
        self.tensors = [self._joined(name, layout) for name in ("q", "k", "v")]
        self.options = dict(self.problems[0].options)
        if self.options["alibi_slopes"] is not None:  # other slopes for each sequence
            self.options["alibi_slopes"] = torch.stack([p.options["alibi_slopes"] for p in self.problems])

    def _joined(self, name, layout):
        t = torch.cat([getattr(p, name)[0].transpose(0, 1) for p in self.problems])  # [tokens, H, D]
        if layout == "heads first":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "packed":  # q, k and v of one projection
            return torch.stack([t, t + 1, t + 2], 1)[:, 0]
        return t

    def call(self, q, k, v, **options):
        return bmk.attention_varlen(q, k, v, *self.cu_seqlens, *self.longest, **self.options, **options)

    def run(self, backend="cpu", with_grad_lse=True):
        """What Problem.run gives for each sequence."""
        tensors = [t.detach().requires_grad_() for t in self.tensors]
        out, lse = self.call(*tensors, return_lse=True, backend=backend)
        outputs = [out]
        grads = [torch.cat([p.grad_out[0].transpose(0, 1) for p in self.problems])]
        if with_grad_lse:
            outputs.append(torch.where(torch.isfinite(lse), lse, 0.0))
            grads.append(torch.cat([p.grad_lse[0] for p in self.problems], 1).to(lse.dtype))
        found = torch.autograd.grad(outputs, tensors, grads)
        ends_q, ends_k = (ends[1:-1].long() for ends in self.cu_seqlens)
        by_sequence = [out.detach().tensor_split(ends_q), lse.detach().tensor_split(ends_q, 1)]
        by_sequence += [t.tensor_split(ends) for t, ends in zip(found, (ends_q, ends_k, ends_k))]
        return [[(t if i == 1 else t.transpose(0, 1))[None] for i, t in enumerate(one)] for one in zip(*by_sequence)]

    def check(self, backend="cpu", baseline=True):
        """The error rule for each sequence."""
        plain = self.run(backend, with_grad_lse=False) if baseline else [None] * len(self.problems)
        for problem, actual, without_lse in zip(self.problems, self.run(backend), plain):
            problem.judge(actual, without_lse)
