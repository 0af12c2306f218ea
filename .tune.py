"""Times each kernel under CUDA-graph replay at real shapes, for some block sizes. PYTHONPATH=server python .tune.py"""
import itertools, math, os, sys, time
os.environ["TRITON_INTERPRET"] = "0"
import torch, types
from pathlib import Path
ROOT = Path(__file__).resolve().parent / "server"
sys.path.insert(0, str(ROOT))
engine = types.ModuleType("adapter_server.engine"); engine.__path__ = [str(ROOT / "adapter_server" / "engine")]
sys.modules["adapter_server.engine"] = engine
from adapter_server.engine import kernels as K
from adapter_server.engine.kernels import attention as AT, block as B, lowrank as L
D = torch.device("cuda")
torch.manual_seed(0)
T0 = time.time()
BUDGET = float(os.environ.get("TUNE_SECONDS", 100))  # no candidates but the defaults after so long
BF, F32 = torch.bfloat16, torch.float32

def graphed(fns, reps=None):
    """us per call, over all fns in turn (each on memory of its own, so that L2 is as cold as in a step)."""
    for f in fns[:2]: f()
    torch.cuda.synchronize()
    reps = reps or max(1, 40 // len(fns))
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(reps):
            for f in fns: f()
    g.replay(); torch.cuda.synchronize()
    best = 1e9
    for _ in range(5):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize()
        best = min(best, a.elapsed_time(b) * 1000 / (reps * len(fns)))
    return best

def row(name, shape, config, us, nbytes, err=None):
    e = "" if err is None else f"  err {err:.1e}"
    print(f"{name:16s} {shape:44s} {config:30s} {us:7.2f} us {nbytes / us / 1e3:7.0f} GB/s{e}", flush=True)

class setting:
    def __init__(self, module, **kw): self.m, self.kw = module, kw
    def __enter__(self):
        self.old = {k: getattr(self.m, k) for k in self.kw}
        for k, v in self.kw.items(): setattr(self.m, k, v)
    def __exit__(self, *a):
        for k, v in self.old.items(): setattr(self.m, k, v)

# ---------------------------------------------------------------- low rank
class Low:
    def __init__(self, inp, outs, adapters, held, tokens=32, r=16, vectors=False, few=True):
        per = adapters * r * (len(outs) * inp + sum(outs)) * (2 if held == BF else 4)
        self.inp, self.outs, self.held, self.r, self.adapters = inp, outs, held, r, adapters
        n = self.copies = max(1, min(24, math.ceil(160e6 / per)))
        R = r * len(outs)
        self.A = torch.randn(n, adapters, R, inp, device=D, dtype=held) / inp**0.5
        self.B = [torch.randn(n, adapters, r, o, device=D, dtype=held) / r**0.5 for o in outs]
        self.v = torch.randn(n, adapters, 2, sum(outs), device=D, dtype=held) * 0.1
        fields = K.HEAD + K.MEMBER * len(outs)
        t = torch.zeros(adapters, n, fields, dtype=torch.int64)
        for a in range(adapters):
            for c in range(n):
                e = [self.A[c, a].data_ptr(), R] + ([self.v[c, a, 0].data_ptr(), self.v[c, a, 1].data_ptr()] if vectors else [0, 0])
                for m in range(len(outs)): e += [self.B[m][c, a].data_ptr(), m * r, r]
                t[a, c] = torch.tensor(e)
        self.table = t.view(adapters, -1).to(D)
        self.fields, self.vectors = fields, vectors
        self.x = torch.randn(tokens, inp, device=D, dtype=BF)
        each = tokens // adapters
        size = next((n for n in (1, 2, K.FEW) if each <= n), K.FEW) if few else K.MANY
        pl = [(a, a * each + i, min(size, each - i), 1) for a in range(adapters) for i in range(0, each, size)]
        pl += [(0, 0, 0, 0)] * 4
        width = math.ceil(R / K.MANY_RANKS) * K.MANY_RANKS
        self.tiles = K.Tiles(torch.arange(tokens, dtype=torch.int32, device=D), torch.ones(tokens, device=D),
            torch.tensor(pl, dtype=torch.int32, device=D), [K.Run(0, len(pl), size)], width,
            torch.empty(64 * tokens * width, device=D))
        self.each, self.tokens = each, tokens
        self.y0 = torch.randn(tokens, sum(outs), device=D, dtype=BF)
        self.bytes = per + (adapters * 2 * sum(outs) * (2 if held == BF else 4) if vectors else 0) + self.x.nbytes + 2 * self.y0.nbytes
    def outputs(self, c):
        o = self.outs
        bl = [(m, s, w, sum(o[:m]) + s) for m, w in enumerate(o) for s in range(0, w, L.WIDE)]
        return K.Outputs(torch.tensor(bl, dtype=torch.int32, device=D), self.inp, c * self.fields, True)
    def fns(self):
        out = [self.outputs(c) for c in range(self.copies)]
        y = self.y0.clone()
        return [lambda o=o: K.add_low_rank(y, self.x, self.tiles, self.table, o, self.held) for o in out]
    def error(self):
        y = self.y0.clone()
        K.add_low_rank(y, self.x, self.tiles, self.table, self.outputs(0), self.held)
        want = self.y0.float().clone()
        for a in range(self.adapters):
            s = slice(a * self.each, (a + 1) * self.each)
            small = (self.x[s].float() @ self.A[0, a].float().T).to(self.held).float()
            d = torch.cat([small[:, m * self.r:(m + 1) * self.r] @ self.B[m][0, a].float() for m in range(len(self.outs))], 1)
            if self.vectors: d = d + want[s] * self.v[0, a, 0].float() + self.v[0, a, 1].float()
            want[s] += d
        return ((y.float() - want).abs() / want.abs().clamp_min(1)).max().item()
    def parts(self):
        """us of shrink alone, expand alone."""
        out = {}
        real = (L._shrink_few, L._expand_few)
        class Nothing:
            def __getitem__(self, g): return lambda *a, **k: None
        for name, i in (("shrink", 1), ("expand", 0)):
            setattr(L, real_names[i], Nothing())
            out[name] = graphed(self.fns())
            setattr(L, real_names[i], real[i])
        return out
real_names = ("_shrink_few", "_expand_few")

G8 = {"8B qkv": (4096, (4096, 1024, 1024)), "8B o": (4096, (4096,)), "8B gate/up": (4096, (14336, 14336)), "8B down": (14336, (4096,))}
G6 = {"0.6B qkv": (1024, (2048, 1024, 1024)), "0.6B o": (2048, (1024,)), "0.6B gate/up": (1024, (3072, 3072)), "0.6B down": (3072, (1024,))}

def low_rank():
    print("== low rank: candidates (16 adapters, 32 tokens, r 16); total, shrink and expand alone")
    best = {}
    for held in (BF, F32):
        cases = {n: Low(*{**G8, **G6}[n], 16, held) for n in ("8B qkv", "8B down", "0.6B qkv")}
        scores = []
        base = dict(MOST_SPLITS=L.MOST_SPLITS, SHRINK_WARPS=L.SHRINK_WARPS, WIDE=L.WIDE, EXPAND_WARPS=L.EXPAND_WARPS)
        for change in ({}, {"SHRINK_WARPS": 2}, {"SHRINK_WARPS": 8}, {"MOST_SPLITS": 8}, {"MOST_SPLITS": 8, "SHRINK_WARPS": 8}, {"EXPAND_WARPS": 2},
                       {"WIDE": 256, "EXPAND_WARPS": 2}, {"WIDE": 256, "EXPAND_WARPS": 1}, {"WIDE": 64}):
            if change and time.time() - T0 > 0.5 * BUDGET: break
            with setting(L, **{**base, **change}):
                us = {n: (graphed(c.fns()), *c.parts().values()) for n, c in cases.items()}
                txt = "  ".join(f"{n} {a:.1f} ({b:.1f}+{c:.1f})" for n, (a, b, c) in us.items())
                print(f"   {str(held)[6:]:9s} {str(change):44s} {txt}", flush=True)
                scores.append((change, us))
        sh = min(scores[:5], key=lambda s: sum(v[1] for v in s[1].values()))[0]
        ex = min([scores[0], *scores[5:]], key=lambda s: sum(v[2] for v in s[1].values()))[0]
        best[held] = {**base, **sh, **ex}
        print("   best:", best[held])
    print("== low rank: all shapes, best config of each format")
    for held in (BF, F32):
        with setting(L, **best[held]):
            cfg = "/".join(str(v) for v in best[held].values())
            for name, (inp, outs) in {**G8, **G6}.items():
                for n in (1, 16, 32):
                    c = Low(inp, outs, n, held)
                    row("low rank", f"{name} {str(held)[6:]} {n} adapters", cfg, graphed(c.fns()), c.bytes, c.error())
                    del c
            c = Low(*G8["8B qkv"], 16, held, vectors=True)
            row("low rank+vectors", f"8B qkv {str(held)[6:]} 16 adapters", cfg, graphed(c.fns()), c.bytes, c.error())
            for name in ("8B qkv", "8B down"):
                c = Low(*G8[name], 16, held, tokens=2048, few=False)
                row("low rank many", f"{name} {str(held)[6:]} 16 x 128 tokens", "", graphed(c.fns()), c.bytes, c.error())
                del c

# ---------------------------------------------------------------- attention
class Att:
    def __init__(self, n, ctx, kv=8, heads=32, dim=128, page=16):
        per = n * ctx * kv * dim * 2 * 2
        self.copies = max(1, min(8, math.ceil(160e6 / per)))
        self.k = torch.randn(self.copies, n * ctx, kv, dim, device=D, dtype=BF)
        self.v = torch.randn_like(self.k)
        pages = ctx // page
        self.table = torch.randperm(n * pages, device=D).view(n, pages).int()
        self.q = torch.randn(n, heads, dim, device=D, dtype=BF).transpose(0, 1)
        self.out = torch.empty(n, heads, dim, device=D, dtype=BF)
        self.rows = K.Rows(self.table, torch.full((n,), ctx, device=D), torch.arange(n, device=D), page, ctx)
        self.form, self.bytes, self.n, self.ctx, self.page = K.Form(dim**-0.5), per, n, ctx, page
    def fns(self):
        return [lambda c=c: K.paged_decode(self.out, self.q, self.k[c], self.v[c], self.rows, self.form) for c in range(self.copies)]
    def error(self):
        K.paged_decode(self.out, self.q, self.k[0], self.v[0], self.rows, self.form)
        at = torch.arange(self.ctx, device=D)
        pl = self.table[:, at // self.page].long() * self.page + at % self.page
        k, v = (t[0][pl].transpose(1, 2).float() for t in (self.k, self.v))
        q = self.q.transpose(0, 1)[:, :, None].float()
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.form.scale, enable_gqa=True)[:, :, 0]
        return (self.out.float() - want).abs().max().item()

def attention():
    print("== paged_decode, 32 rows, 8 kv heads of 128, 32 heads (keys of a chunk, of a turn, warps)")
    for ctx in (128, 512, 1024):
        c = Att(32, ctx)
        found = []
        for chunk, keys, warps in ((128, 64, 4), (64, 64, 4), (64, 32, 2), (256, 64, 4), (128, 32, 2), (128, 128, 4)):
            if found and time.time() - T0 > 0.75 * BUDGET: break
            with setting(AT, CHUNK=chunk, KEYS=keys, ATTEND_WARPS=warps):
                found.append((graphed(c.fns()), f"{chunk}/{keys}/{warps}", c.error()))
        print("  ", "  ".join(f"{cfg} {us:.1f}" for us, cfg, _ in found))
        us, cfg, err = min(found)
        row("paged_decode", f"32 x {ctx}", cfg, us, c.bytes, err)
    c = Att(1, 1024); row("paged_decode", "1 x 1024", "default", graphed(c.fns()), c.bytes, c.error())
    c = Att(32, 512); c.rows = K.Rows(c.rows.table, c.rows.lengths, c.rows.tokens, c.page, 8192)
    for most, programs in ((64, 1 << 20), (64, 4096), (64, 2048), (64, 1024), (16, 2048)):
        with setting(AT, MOST_CHUNKS=most, PROGRAMS=programs):
            row("paged_decode", "32 x 512, room for 8192", f"{most} chunks, {programs}", graphed(c.fns()), c.bytes, c.error())
    print("== paged_prefill, 4 rows of 512 new tokens (tokens of a tile, warps, stages); TFLOP/s in the last column's place")
    n, t, heads, dim, page = 4, 512, 32, 128, 16
    k, v = (torch.randn(n * t, 8, dim, device=D, dtype=BF) for _ in range(2))
    q, out = torch.randn(n * t, heads, dim, device=D, dtype=BF).transpose(0, 1), torch.empty(n * t, heads, dim, device=D, dtype=BF)
    table = torch.arange(n * t // page, device=D).view(n, -1).int()
    for size, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 4, 2)):
        with setting(AT, QUERIES=size, PREFILL_WARPS=warps, PREFILL_STAGES=stages):
            tiles = torch.tensor([(i, i * t + a, size, a) for i in range(n) for a in range(0, t, size)], dtype=torch.int32, device=D)
            ch = K.Chunks(table, tiles, page)
            try: us = graphed([lambda: K.paged_prefill(out, q, k, v, ch, K.Form(dim**-0.5))], 10)
            except Exception as e: print("  ", size, warps, stages, repr(e)[:80]); continue
            qq = q.view(heads, n, t, dim).transpose(0, 1).float(); kk, vv = (z.view(n, t, 8, dim).transpose(1, 2).float() for z in (k, v))
            want = torch.nn.functional.scaled_dot_product_attention(qq, kk, vv, is_causal=True, scale=dim**-0.5, enable_gqa=True)
            err = (out.view(n, t, heads, dim).transpose(1, 2).float() - want).abs().max().item()
            print(f"   {size}/{warps}/{stages}: {us:.1f} us  {n * heads * t * t * dim * 2 / us / 1e6:.0f} TFLOP/s  err {err:.1e}", flush=True)
    sd = graphed([lambda: torch.nn.functional.scaled_dot_product_attention(q.view(heads, n, t, dim).transpose(0, 1), k.view(n, t, 8, dim).transpose(1, 2), v.view(n, t, 8, dim).transpose(1, 2), is_causal=True, enable_gqa=True)], 10)
    print(f"   torch's sdpa, contiguous: {sd:.1f} us")

# ---------------------------------------------------------------- block
def blocks():
    print("== block (inputs warm in L2, as after the product that wrote them)")
    for n in (1024, 4096):
        x, r = (torch.randn(32, n, device=D, dtype=BF) for _ in range(2)); w = torch.randn(n, device=D, dtype=BF)
        want = torch.nn.functional.rms_norm(x.float(), (n,), w.float(), 1e-6)
        err = (K.rms_norm(x, w, 1e-6).float() - want).abs().max().item()
        row("rms_norm", f"32 x {n}", "", graphed([lambda: K.rms_norm(x, w, 1e-6)], 50), 2 * x.nbytes, err)
        row("add_rms_norm", f"32 x {n}", "", graphed([lambda: K.add_rms_norm(x, r, w, 1e-6)], 50), 4 * x.nbytes)
    for n in (3072, 14336):
        both = torch.randn(32, 2 * n, device=D, dtype=BF)
        want = torch.nn.functional.silu(both[:, :n]) * both[:, n:]
        for block, warps in ((1024, 4), (512, 2), (2048, 4), (1024, 2), (256, 1)):
            with setting(B, GATE=block, GATE_WARPS=warps):
                err = (K.gated(both, "silu").float() - want.float()).abs().max().item()
                row("gated", f"32 x {n}", f"{block}/{warps}", graphed([lambda: K.gated(both, "silu")], 50), 1.5 * both.nbytes, err)
    for name, heads, normed in (("8B", 32, False), ("0.6B", 16, True)):
        kv, dim = 8, 128
        mixed = torch.randn(32, (heads + 2 * kv) * dim, device=D, dtype=BF)
        ang = torch.randn(32, dim // 2, device=D).repeat(1, 2); cos, sin = ang.cos().to(BF), ang.sin().to(BF)
        keys, values = (torch.zeros(4096, kv, dim, device=D, dtype=BF) for _ in range(2)); places = torch.arange(32, device=D)
        norm = K.Norm(torch.ones(dim, device=D, dtype=BF), 1e-6) if normed else None
        for h, w in ((4, 2), (2, 1), (1, 1), (8, 4), (4, 4)):
            with setting(B, HEADS=h, HEADS_WARPS=w):
                row("rope_write", f"{name} 32 tokens", f"{h}/{w}", graphed([lambda: K.rope_write(mixed, cos, sin, keys, values, places, heads, kv, norm, norm)], 50), 2 * mixed.nbytes)
    for n in (1, 32):
        logits = torch.randn(n, 151936, device=D, dtype=BF)
        for span in (4096, 2048, 8192):
            with setting(B, SPAN=span):
                ids, _ = K.pick(logits)
                row("pick", f"{n} x 151936", str(span), graphed([lambda: K.pick(logits)], 20), logits.nbytes, float((ids != logits.float().argmax(1)).sum()))
    row("torch argmax", "32 x 151936", "", graphed([lambda: logits.argmax(1)], 20), logits.nbytes)

def products():
    print("== few_rows (rows of W, columns, warps, stages) against cuBLAS")
    for out, inp in ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)):
        n = max(1, math.ceil(160e6 / (2 * out * inp)))
        W = torch.randn(n, out, inp, device=D, dtype=BF) / inp**0.5
        for m in (1, 32):
            x = torch.randn(m, inp, device=D, dtype=BF)
            cfgs = []
            for tiling in K.TILINGS:
                if cfgs and time.time() - T0 > BUDGET: break
                err = (K.few_rows(x, W[0], None, tiling).float() - x.float() @ W[0].float().T).abs().max().item()
                cfgs.append((graphed([lambda w=w: K.few_rows(x, w, None, tiling) for w in W]), "/".join(map(str, tiling)), err))
            blas = graphed([lambda w=w: torch.nn.functional.linear(x, w) for w in W])
            us, cfg, err = min(cfgs)
            row("few_rows", f"{m} x [{out} x {inp}], cuBLAS {blas:.1f} us", cfg, us, W[0].nbytes, err)

if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    for part in (blocks, low_rank, attention, products):
        try: part()
        except Exception as e:
            import traceback; traceback.print_exc()
        print(f"-- {time.time() - T0:.0f} s", flush=True)
