"""The PyTorch row of `bench.py`: the same GPT under torch.compile and autocast, on a GPU only."""

from __future__ import annotations


def gpt_step(config, batch_size, dtype_name, device="cuda", compiled=True):
    """Returns a function of no arguments that trains one step and returns the loss (a tensor).

    `config` is a `jaxmp.nn.models.gpt.GPTConfig`. Raises ImportError without torch, RuntimeError
    without a GPU.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no GPU for torch here")
    torch.set_float32_matmul_precision("high")
    width, heads = config.width, config.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up = nn.Linear(width, config.mlp_ratio * width)
            self.down = nn.Linear(config.mlp_ratio * width, width)

        def forward(self, x):
            b, t, _ = x.shape
            parts = self.qkv(self.norm1(x)).split(width, dim=-1)
            q, k, v = (part.view(b, t, heads, -1).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(config.vocab_size, width)
            self.positions = nn.Embedding(config.context, width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.depth))
            self.norm = nn.LayerNorm(width)
            nn.init.normal_(self.tokens.weight, std=0.02)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    torch.manual_seed(0)
    model = GPT().to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    dtype = getattr(torch, dtype_name)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    shape = (batch_size, config.context)
    tokens = torch.randint(config.vocab_size, shape, device=device)
    targets = torch.randint(config.vocab_size, shape, device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype):
            loss = run(tokens, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step
