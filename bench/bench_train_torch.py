#!/usr/bin/env python3
"""The training step of bench_train in PyTorch: same model, sizes, losses and optimizer, float32, plain eager modules.

    python3 bench/bench_train_torch.py --preset micro --batch 8 --seq 256 --threads 2

bench/bench_train.sh runs both in turn and prints the ratio; bench/README.md says what is compared.
"""
import argparse
import os
import statistics
import sys
import time


def parse():
    parser = argparse.ArgumentParser(description="Speed of training steps in PyTorch; see bench/README.md.")
    parser.add_argument("--preset", choices=("micro", "austen"), default="micro")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="default: what PyTorch chooses")
    parser.add_argument("--repeat", type=int, default=5, help="steps timed; one more before them is not")
    parser.add_argument("--line", action="store_true", help="one line of key=value pairs")
    return parser.parse_args()


OPTIONS = parse()
if OPTIONS.threads:  # OpenBLAS has threads of its own, and reads this when it is loaded
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(OPTIONS.threads)

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    sys.exit("bench_train_torch: PyTorch is not installed (Debian: python3-torch)")

PRESETS = {
    "micro": dict(V=256, d=64, I=192, F=32, L=3, D=1, dense=1, H=4, rq=0, rk=32, dn=16, dr=8, dv=16, E=8, K=2, G=1,
                  Gt=1, shared=1),
    "austen": dict(V=256, d=160, I=448, F=40, L=5, D=4, dense=1, H=5, rq=96, rk=64, dn=32, dr=16, dv=32, E=32, K=4,
                   G=4, Gt=2, shared=1),
}
LAMBDA, ALPHA, BIAS_SPEED, CLIP, RATE, DECAY = 0.3, 0.0001, 0.001, 1.0, 1e-3, 0.1


class RMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def linear(n_in, n_out):
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def rotate(x, cos, sin):
    """Pairs (2i, 2i+1) of x [B, T, heads, dr] by the angles of cos, sin [T, 1, dr/2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Attention(nn.Module):
    """MLA with keys and values rebuilt from the latents, as training has it."""

    def __init__(self, c):
        super().__init__()
        self.c, width = c, c["H"] * (c["dn"] + c["dr"])
        if c["rq"]:
            self.q_a_proj, self.q_a_layernorm = linear(c["d"], c["rq"]), RMSNorm(c["rq"])
            self.q_b_proj = linear(c["rq"], width)
        else:
            self.q_proj = linear(c["d"], width)
        self.kv_a_proj_with_mqa = linear(c["d"], c["rk"] + c["dr"])
        self.kv_a_layernorm = RMSNorm(c["rk"])
        self.kv_b_proj = linear(c["rk"], c["H"] * (c["dn"] + c["dv"]))
        self.o_proj = linear(c["H"] * c["dv"], c["d"])

    def forward(self, u, tables):
        c, (B, T, _) = self.c, u.shape
        cos, sin, mask = (table[:T] for table in tables)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(u))) if c["rq"] else self.q_proj(u)
        qn, qr = q.view(B, T, c["H"], -1).split((c["dn"], c["dr"]), -1)
        latent, kr = self.kv_a_proj_with_mqa(u).split((c["rk"], c["dr"]), -1)
        kn, v = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, c["H"], -1).split((c["dn"], c["dv"]), -1)
        kr = rotate(kr.unsqueeze(2), cos, sin).expand(B, T, c["H"], c["dr"])
        q = torch.cat((qn, rotate(qr, cos, sin)), -1).transpose(1, 2)
        k = torch.cat((kn, kr), -1).transpose(1, 2)
        s = q @ k.transpose(2, 3) * (c["dn"] + c["dr"]) ** -0.5 + mask[:, :T]
        return self.o_proj((s.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, d, width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d, width), linear(d, width), linear(width, d)

    def forward(self, u):
        return self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate = linear(c["d"], c["E"])
        self.experts = nn.ModuleList(MLP(c["d"], c["F"]) for _ in range(c["E"]))
        self.shared_experts = MLP(c["d"], c["shared"] * c["F"])
        self.register_buffer("bias", torch.zeros(c["E"]))
        self.register_buffer("load", torch.zeros(c["E"]))
        self.balance = 0.0

    def choose(self, score):
        c, choice = self.c, score.detach() + self.bias
        if c["G"] > 1:
            groups = choice.view(-1, c["G"], c["E"] // c["G"])
            best = groups.topk(2, -1).values.sum(-1).topk(c["Gt"], -1).indices
            dropped = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, best, False)
            choice = groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        return choice.topk(c["K"], -1).indices

    def sequence_loss(self, score, B):
        """sum_i f_i P_i of each sequence, f from the K largest scores; the sum over sequences."""
        c, score = self.c, score.view(B, -1, self.c["E"])
        T = score.shape[1]
        f = torch.zeros_like(score).scatter(2, score.detach().topk(c["K"], -1).indices, 1.0).sum(1)
        p = (score / score.sum(-1, keepdim=True)).mean(1)
        return (f * p).sum() * (c["E"] / (c["K"] * T))

    def forward(self, u):
        c, (B, T, d) = self.c, u.shape
        x = u.reshape(-1, d)
        score = self.gate(x).sigmoid()
        idx = self.choose(score)
        gate = score.gather(1, idx)
        gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)
        self.balance = self.sequence_loss(score, B)
        y = self.shared_experts(x)
        flat, counts = idx.flatten(), torch.bincount(idx.flatten(), minlength=c["E"])
        self.load += counts
        order = flat.argsort(stable=True)
        rows, weights = order // c["K"], gate.flatten()[order].unsqueeze(1)
        at = 0
        parts = []
        for expert, n in zip(self.experts, counts.tolist()):
            if n:
                parts.append(expert(x[rows[at:at + n]]) * weights[at:at + n])
            at += n
        return y.index_add(0, rows, torch.cat(parts)).view(B, T, d)


class Block(nn.Module):
    def __init__(self, c, moe):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c["d"]), RMSNorm(c["d"])
        self.self_attn = Attention(c)
        self.mlp = MoE(c) if moe else MLP(c["d"], c["I"])

    def forward(self, x, tables):
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return x + self.mlp(self.post_attention_layernorm(x))


class Module(Block):
    """An MTP module: a block behind the projection of the next token's embedding and the state before."""

    def __init__(self, c):
        super().__init__(c, True)
        self.enorm, self.hnorm, self.norm = RMSNorm(c["d"]), RMSNorm(c["d"]), RMSNorm(c["d"])
        self.eh_proj = linear(2 * c["d"], c["d"])

    def forward(self, h, embedded, tables):
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(h)), -1))
        return self.norm(super().forward(x, tables))


class Model(nn.Module):
    def __init__(self, c, T):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["V"], c["d"])
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Block(c, i >= c["dense"]) for i in range(c["L"]))
        self.norm, self.lm_head = RMSNorm(c["d"]), linear(c["d"], c["V"])
        self.modules_mtp = nn.ModuleList(Module(c) for _ in range(c["D"]))
        angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, c["dr"], 2) / c["dr"])).unsqueeze(1)
        mask = torch.full((T, T), float("-inf")).triu(1)
        self.tables = (angle.cos(), angle.sin(), mask)

    def losses(self, token, target):
        """Sums of -log p over the targets of each depth; depth k has T - k of each sequence."""
        B, T = token.shape
        x = self.embed_tokens(token)
        for layer in self.layers:
            x = layer(x, self.tables)
        h = self.norm(x)
        sums = [F.cross_entropy(self.lm_head(h).flatten(0, 1), target.flatten(), reduction="sum")]
        for k, module in enumerate(self.modules_mtp, 1):
            h = module(h[:, :T - k], self.embed_tokens(token[:, k:]), self.tables)
            sums.append(F.cross_entropy(self.lm_head(h).flatten(0, 1), target[:, k:].flatten(), reduction="sum"))
        return sums


def step(model, optimizer, batches):
    """One optimizer step; returns the main loss. Every term has its final weight where it is made."""
    targets = sum(token.numel() for token, _ in batches)
    sequences = sum(token.shape[0] for token, _ in batches)
    moes = [m for m in model.modules() if isinstance(m, MoE)]
    main = 0.0
    optimizer.zero_grad()
    for token, target in batches:
        sums = model.losses(token, target)
        loss = sums[0] / targets + ALPHA / sequences * sum(m.balance for m in moes)
        if len(sums) > 1:
            loss = loss + LAMBDA / (len(sums) - 1) / targets * sum(sums[1:])
        loss.backward()
        main += sums[0].item() / targets
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    for m in moes:
        m.bias += BIAS_SPEED * torch.sign(m.load.mean() - m.load)
        m.load.zero_()
    return main


def make_optimizer(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    try:
        return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    except TypeError:  # older than 1.12
        return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)


def blas():
    """The library that multiplies matrices, as far as the list of loaded files tells."""
    try:
        with open("/proc/self/maps") as maps:
            names = {line.split()[-1].rsplit("/", 1)[-1] for line in maps if "/" in line}
    except OSError:
        names = set()
    found = sorted(n for n in names if "blas" in n or "mkl" in n)
    return "MKL" if torch.backends.mkl.is_available() else ",".join(found) or "unknown"


def main():
    o = OPTIONS
    if o.threads:
        torch.set_num_threads(o.threads)
    torch.manual_seed(1)
    c = PRESETS[o.preset]
    model = Model(c, o.seq)
    parameters = sum(p.numel() for p in model.parameters()) + sum(m.bias.numel() for m in model.modules() if
                                                                  isinstance(m, MoE))
    optimizer = make_optimizer(model)
    stream = torch.randint(c["V"], (o.accum, o.batch, o.seq + 1))
    batches = [(s[:, :-1], s[:, 1:]) for s in stream]
    seconds, first = [], 0.0
    for i in range(o.repeat + 1):
        begin = time.perf_counter()
        loss = step(model, optimizer, batches)
        seconds.append(time.perf_counter() - begin)
        first = loss if i == 0 else first
    seconds = seconds[1:]
    tokens, median = o.accum * o.batch * o.seq, statistics.median(seconds)
    if o.line:
        print(f"preset={o.preset} torch={torch.__version__} blas={blas()} threads={torch.get_num_threads()} "
              f"batch={o.batch} seq={o.seq} accum={o.accum} tokens_s={tokens / median:.1f} "
              f"ms_step={1e3 * median:.3f} parameters={parameters} loss={first:.4f}")
    else:
        print(f"{o.preset}, PyTorch {torch.__version__} ({blas()}), threads {torch.get_num_threads()}, "
              f"{o.batch} x {o.seq} tokens, {o.accum} micro-batch{'' if o.accum == 1 else 'es'}, repeats {o.repeat}")
        print(f"parameters {parameters}, loss {first:.4f} at the start")
        print(f"tokens/s   {tokens / median:.1f} ({tokens / max(seconds):.1f} .. {tokens / min(seconds):.1f})")
        print(f"ms/step    {1e3 * median:.2f}")


main()
