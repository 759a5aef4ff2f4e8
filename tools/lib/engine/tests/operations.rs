//! Each operation of the CPU backend against its definition, written out in f64
//! on random odd shapes; each gradient against central differences of that
//! definition.
//!
//! Beside each limit stands the largest error seen on 2026-11-30: of 24 runs, 0, 1000, 2000,
//! … added to the seeds, each with AVX-512, with AVX2 and without either (CPUID masked). Limits
//! are three to seven times that; where less, above the mean by more than seven standard
//! deviations. All of it is rounding to f32: with steps of 1e-6 or 1e-4 in place of 1e-5 the
//! central differences, in f64, change a figure by at most 5e-8.
#![allow(clippy::unwrap_used)]

use engine::nf4::Nf4Tensor;
use engine::{
    AdamW, Adapter, Backend, Cache, Cpu, Dora, Group, Heads, HostMatrix, LinearGrad, MatrixData,
    Member, QkNorms, Ragged, Sampling, Stretch, Workspace,
};
use half::bf16;

/// Random values: SplitMix64, uniform in ±1.
struct Draw(u64);

impl Draw {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        let one = |_| (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..len).map(one).collect()
    }

    fn ids(&mut self, len: usize, below: u64) -> Vec<u32> {
        (0..len).map(|_| (self.bits() % below) as u32).collect()
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The largest difference, by the largest value.
fn off(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().fold(1e-30_f64, |m, x| m.max(x.abs()));
    let pairs = got.iter().zip(want);
    // `max` would pass over what is not a number.
    assert!(got.iter().all(|x| x.is_finite()));
    pairs.fold(0.0_f64, |m, (g, w)| m.max((f64::from(*g) - w).abs())) / top
}

/// Asserts that the largest difference, by the largest value, is below a limit.
fn near(name: &str, got: &[f32], want: &[f64], limit: f64) {
    let error = off(got, want);
    println!("{name}: {error:.1e}");
    assert!(error < limit, "{name}: off by {error:e}");
}

/// Checks about forty entries of `∂ Σ dout · f / ∂ x` by central differences.
fn check_gradient(
    name: &str,
    got: &[f32],
    x: &[f64],
    dout: &[f32],
    f: impl Fn(&[f64]) -> Vec<f64>,
    limit: f64,
) {
    let value = |x: &[f64]| -> f64 { f(x).iter().zip(dout).map(|(y, &d)| y * f64::from(d)).sum() };
    let top = got.iter().fold(1e-30_f32, |m, x| m.max(x.abs()));
    let (h, stride) = (1e-5, (x.len() / 40).max(1) | 1);
    let mut worst = 0.0_f64;
    for i in (0..x.len()).step_by(stride) {
        let mut moved = x.to_vec();
        moved[i] = x[i] + h;
        let above = value(&moved);
        moved[i] = x[i] - h;
        let want = (above - value(&moved)) / (2.0 * h);
        let error = (f64::from(got[i]) - want).abs() / f64::from(top);
        assert!(
            error < limit,
            "{name}[{i}]: {} is not {want} ({error:e})",
            got[i]
        );
        worst = worst.max(error);
    }
    println!("{name}: {worst:.1e}");
}

fn scratch(bytes: usize) -> Workspace {
    Cpu.alloc_workspace(bytes).unwrap()
}

fn rms(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let rows = x.chunks(w.len());
    let row = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter()
            .zip(w)
            .map(|(x, w)| x / (mean + eps).sqrt() * w)
            .collect()
    };
    rows.flat_map(row).collect()
}

#[test]
fn rms_norm() {
    // With a width of 1 and a small eps the gradient is what two almost equal terms leave;
    // a single small one also loses digits to what it is added to.
    for (tokens, width, eps, limit) in [
        (1, 1, 0.5, 5e-6),     // 1.7e-6
        (3, 37, 1e-3, 5e-7),   // 1.1e-7
        (700, 65, 1e-3, 5e-7), // 1.1e-7
    ] {
        let mut draw = Draw(1);
        let (x, w, dy) = (
            draw.vec(tokens * width),
            draw.vec(width),
            draw.vec(tokens * width),
        );
        let (mut out, mut rstd) = (vec![0.0; x.len()], vec![0.0; tokens]);
        let size = [tokens, width];
        Cpu.rms_norm(&x, (&w, eps), size, &mut out, &mut rstd);
        let f = |x: &[f64]| rms(x, &wide(&w), f64::from(eps));
        near("rms_norm", &out, &f(&wide(&x)), 5e-7); // 1.7e-7
        // The gradient is added to what is there.
        let start = draw.vec(x.len());
        let mut dx = start.clone();
        Cpu.rms_norm_backward(&dy, (&x, &w, &rstd), size, &mut dx);
        let added: Vec<f32> = dx.iter().zip(&start).map(|(a, b)| a - b).collect();
        check_gradient("rms_norm's dx", &added, &wide(&x), &dy, f, limit);
    }
}

#[test]
fn swiglu() {
    let (tokens, width) = (41, 73);
    let mut draw = Draw(2);
    let mut gate_up = draw.vec(tokens * 2 * width);
    gate_up.iter_mut().for_each(|x| *x *= 8.0);
    let dout = draw.vec(tokens * width);
    let f = |x: &[f64]| -> Vec<f64> {
        let row = |x: &[f64]| -> Vec<f64> {
            let (gate, up) = x.split_at(width);
            gate.iter()
                .zip(up)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect()
        };
        x.chunks(2 * width).flat_map(row).collect()
    };
    let mut out = vec![0.0; tokens * width];
    Cpu.swiglu(&gate_up, [tokens, width], &mut out);
    near("swiglu", &out, &f(&wide(&gate_up)), 5e-7); // 1.3e-7
    let mut grad = vec![0.0; gate_up.len()];
    Cpu.swiglu_backward(&gate_up, &dout, [tokens, width], &mut grad);
    check_gradient("dgate_up", &grad, &wide(&gate_up), &dout, f, 1e-6); // 2.4e-7
}

/// A weight and its values as the backend will see them.
fn weight(draw: &mut Draw, [rows, cols]: [usize; 2], kind: usize) -> (HostMatrix, Vec<f64>) {
    let values = draw.vec(rows * cols);
    let matrix = match kind {
        0 => HostMatrix::f32(rows, cols, values),
        1 => HostMatrix::bf16(rows, cols, values.into_iter().map(bf16::from_f32).collect()),
        _ => HostMatrix::nf4(Nf4Tensor::quantize([rows, cols], &values, true).unwrap()),
    };
    let decoded = match &matrix.data {
        MatrixData::F32(v) => wide(v),
        MatrixData::Bf16(v) => v.iter().map(|x| f64::from(x.to_f32())).collect(),
        MatrixData::Nf4(t) => {
            let mut v = vec![0.0; rows * cols];
            t.dequantize_into(&mut v);
            wide(&v)
        }
    };
    (matrix, decoded)
}

/// `x Wᵀ`
fn times_transposed(x: &[f64], w: &[f64], inputs: usize) -> Vec<Vec<f64>> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    let row = |x: &[f64]| w.chunks(inputs).map(|w| dot(x, w)).collect();
    x.chunks(inputs).map(row).collect()
}

#[test]
fn linear() {
    // Small and odd; then past a tile in both directions and past a widened stretch.
    for (kind, tokens, inputs, outputs, dora) in [
        (0, 1, 5, [3, 1, 2], false),
        (0, 7, 33, [7, 70, 5], false),
        (0, 19, 33, [7, 70, 5], false),
        (0, 19, 33, [7, 70, 5], true),
        (1, 19, 33, [7, 70, 5], false),
        (1, 7, 33, [7, 70, 5], true),
        (2, 19, 64, [7, 70, 5], false),
        (0, 300, 24, [530, 8, 9], false),
        (0, 300, 24, [530, 8, 9], true),
        (2, 270, 24, [600, 8, 520], false),
        (2, 270, 24, [600, 8, 520], true),
        (2, 8, 24, [600, 8, 520], false),
        // Sums of more terms than are added up at once, ranks beyond what joins them.
        (0, 20, 300, [70, 40, 9], false),
        (0, 20, 300, [70, 40, 9], true),
    ] {
        let mut draw = Draw(3 + kind as u64);
        let weights: Vec<_> = outputs.map(|o| weight(&mut draw, [o, inputs], kind)).into();
        // The middle member has no adapter; the parameters start behind others'.
        let ranks = if inputs > 256 { [30, 0, 70] } else { [3, 0, 4] };
        let (scales, mut at) = ([0.7_f32, 0.0, 1.3], 11);
        let mut adapters = [None; 3];
        let mut place = |len: usize| {
            at += len;
            at - len
        };
        for m in [0, 2] {
            adapters[m] = Some(Adapter {
                rank: ranks[m],
                scale: scales[m],
                a: place(ranks[m] * inputs),
                b: 0,
                module: m as u32,
                dora: None,
            });
        }
        for m in [0, 2] {
            adapters[m].as_mut().unwrap().b = place(outputs[m] * ranks[m]);
        }
        // Of members with DoRA, the first alone where there are three kinds.
        for m in [0, 2]
            .into_iter()
            .filter(|&m| dora && (kind == 2 || m == 0))
        {
            adapters[m].as_mut().unwrap().dora = Some(Dora {
                magnitude: place(outputs[m]),
                norm: place(outputs[m]),
            });
        }
        let mut params = draw.vec(at);
        for (adapter, (weight, w)) in adapters.iter().zip(&weights) {
            let Some((a, dora)) = adapter.and_then(|a| Some((a, a.dora?))) else {
                continue;
            };
            let (factor_a, factor_b) = (wide(&params[a.a..]), wide(&params[a.b..]));
            let want: Vec<f64> = (0..weight.rows)
                .map(|o| {
                    let updated = |i: usize| {
                        let ba = (0..a.rank)
                            .map(|r| factor_b[o * a.rank + r] * factor_a[r * inputs + i]);
                        w[o * inputs + i] + f64::from(a.scale) * ba.sum::<f64>()
                    };
                    (0..inputs).map(|i| updated(i).powi(2)).sum::<f64>().sqrt()
                })
                .collect();
            let before = params.clone();
            let mut ws = scratch(Cpu.dora_scratch(weight, a.rank));
            Cpu.dora_norms(weight, &a, &mut params, &mut ws);
            let norms = dora.norm..dora.norm + weight.rows;
            near("norms", &params[norms.clone()], &want, 5e-7); // 1.1e-7
            assert_eq!(params[..norms.start], before[..norms.start]);
            assert_eq!(params[norms.end..], before[norms.end..]);
        }
        let members: Vec<_> = weights
            .iter()
            .zip(adapters)
            .map(|((weight, _), adapter)| Member { weight, adapter })
            .collect();
        let group = Group {
            layer: 0,
            members: &members,
        };
        let total: usize = outputs.iter().sum();
        let (x, dout) = (draw.vec(tokens * inputs), draw.vec(tokens * total));
        let residual = draw.vec(tokens * total);

        // The norms are constants, whatever the parameters.
        let norms = wide(&params);
        let f = |x: &[f64], params: &[f64]| -> Vec<f64> {
            let mut out = vec![0.0; tokens * total];
            let mut column = 0;
            for (m, (_, w)) in weights.iter().enumerate() {
                let base = times_transposed(x, w, inputs);
                let update = adapters[m].map(|a| {
                    let xa =
                        times_transposed(x, &params[a.a..a.a + a.rank * inputs], inputs).concat();
                    times_transposed(&xa, &params[a.b..a.b + outputs[m] * a.rank], a.rank)
                });
                for t in 0..tokens {
                    for o in 0..outputs[m] {
                        let update = update
                            .as_ref()
                            .map_or(0.0, |u| u[t][o] * f64::from(scales[m]));
                        let dora = adapters[m].and_then(|a| a.dora);
                        let gain =
                            dora.map_or(1.0, |d| params[d.magnitude + o] / norms[d.norm + o]);
                        out[t * total + column + o] = gain * (base[t][o] + update);
                    }
                }
                column += outputs[m];
            }
            out
        };
        let (wx, wp) = (wide(&x), wide(&params));
        let plain = f(&wx, &wp);
        let sum: Vec<f64> = plain
            .iter()
            .zip(&residual)
            .map(|(a, &b)| a + f64::from(b))
            .collect();
        let bytes = {
            let weights: Vec<_> = weights.iter().map(|(w, _)| w).collect();
            Cpu.linear_scratch(&weights, [tokens, 7], dora)
        };
        let mut ws = scratch(bytes);
        let (mut out, mut xa) = (
            vec![0.0; tokens * total],
            vec![0.0; tokens * ranks.iter().sum::<usize>()],
        );
        for (residual, want) in [(None, &plain), (Some(&residual), &sum)] {
            let input = (&x, tokens);
            Cpu.linear(
                &group,
                Some(&params),
                None,
                input,
                residual,
                &mut out,
                &mut xa,
                &mut ws,
            );
            near("linear", &out, want, 2e-6); // 5.1e-7
        }

        let mut dx = vec![0.0; x.len()];
        let start = draw.vec(params.len());
        let mut grads = start.clone();
        let want = LinearGrad {
            dx: Some(&mut dx),
            grads: Some(&mut grads),
        };
        let input = (&x, tokens);
        Cpu.linear_backward(
            &group,
            Some(&params),
            None,
            input,
            &xa,
            &dout,
            want,
            &mut ws,
        );
        check_gradient("linear's dx", &dx, &wx, &dout, |x| f(x, &wp), 2e-6); // 4.6e-7
        let added: Vec<f32> = grads.iter().zip(&start).map(|(a, b)| a - b).collect();
        check_gradient("grads", &added, &wp, &dout, |p| f(&wx, p), 1e-6); // 3.3e-7
        // Far fewer than the factors: each of them looked at.
        for (a, (weight, _)) in adapters.iter().zip(&weights) {
            if let Some(Dora { magnitude, .. }) = a.and_then(|a| a.dora) {
                let range = magnitude..magnitude + weight.rows;
                let with = |m: &[f64]| {
                    let mut params = wp.clone();
                    params[range.clone()].copy_from_slice(m);
                    f(&wx, &params)
                };
                let dm = &added[range.clone()];
                check_gradient("magnitudes", dm, &wp[range.clone()], &dout, with, 2e-6); // 6.5e-7
            }
        }
        // What belongs to nobody stays, and so does what norms would get.
        assert_eq!(grads[..11], start[..11]);
        for (a, (weight, _)) in adapters.iter().zip(&weights) {
            if let Some(Dora { norm, .. }) = a.and_then(|a| a.dora) {
                let norms = norm..norm + weight.rows;
                assert_eq!(grads[norms.clone()], start[norms]);
            }
        }

        // Without dX the factors' gradients are the same bits.
        let mut again = start.clone();
        let want = LinearGrad {
            dx: None,
            grads: Some(&mut again),
        };
        Cpu.linear_backward(
            &group,
            Some(&params),
            None,
            input,
            &xa,
            &dout,
            want,
            &mut ws,
        );
        assert_eq!(again, grads);
    }
}

const HEADS: Heads = Heads {
    query: 6,
    kv: 2,
    dim: 10,
};

#[test]
fn qk_norm_and_rotation() {
    let h = HEADS;
    let lengths = [(0, 4), (1, 1), (2, 90)];
    let rows = Ragged::new(&Cpu, &lengths).unwrap();
    let tokens = rows.tokens();
    let mut draw = Draw(5);
    let (q_norm, k_norm) = (draw.vec(h.dim), draw.vec(h.dim));
    let rope: Vec<f32> = (0..90)
        .flat_map(|p| {
            let angle = move |i: usize| f64::from(p) * 10_f64.powf(-(i as f64) / 5.0);
            let cos = (0..5).map(move |i| angle(i).cos() as f32);
            cos.chain((0..5).map(move |i| angle(i).sin() as f32))
        })
        .collect();
    let norms = QkNorms {
        q_norm: &q_norm,
        k_norm: &k_norm,
        rope: &rope,
        eps: 1e-4,
    };
    let qkv = draw.vec(tokens * h.qkv());
    let position = |t: usize| rows.positions[t] as usize;
    assert_eq!([3, 4, 5, 94].map(position), [3, 0, 0, 89]);
    let f = |x: &[f64]| -> Vec<f64> {
        let mut out = Vec::new();
        for (t, x) in x.chunks(h.qkv()).enumerate() {
            for head in 0..h.query + h.kv {
                let w = if head < h.query { &q_norm } else { &k_norm };
                let n = rms(&x[head * h.dim..][..h.dim], &wide(w), 1e-4);
                let (cos, sin) = rope[position(t) * h.dim..][..h.dim].split_at(h.dim / 2);
                let turn = |i: usize| (f64::from(cos[i % 5]), f64::from(sin[i % 5]));
                for i in 0..h.dim {
                    let (c, s) = turn(i);
                    // rotate_half: the second half comes first, negated
                    let other = if i < 5 { -n[i + 5] } else { n[i - 5] };
                    out.push(n[i] * c + other * s);
                }
            }
        }
        out
    };
    let (mut qk, mut rstd) = (vec![0.0; tokens * h.qk()], vec![0.0; tokens * 8]);
    Cpu.qk_norm_rope(h, &norms, &rows.positions, tokens, &qkv, &mut qk, &mut rstd);
    near("qk", &qk, &f(&wide(&qkv)), 5e-7); // 1.6e-7

    let dqk = draw.vec(qk.len());
    let mut dqkv = draw.vec(qkv.len());
    let values = dqkv.clone();
    for (d, dqk) in dqkv.chunks_mut(h.qkv()).zip(dqk.chunks(h.qk())) {
        d[..h.qk()].copy_from_slice(dqk);
    }
    let saved = (&qkv, &rstd);
    Cpu.qk_norm_rope_backward(h, &norms, &rows.positions, tokens, saved, &mut dqkv);
    for (got, values) in dqkv.chunks_mut(h.qkv()).zip(values.chunks(h.qkv())) {
        // The values' columns are not touched; by the definition they have no gradient.
        assert_eq!(got[h.qk()..], values[h.qk()..]);
        got[h.qk()..].fill(0.0);
    }
    check_gradient("qk's dqkv", &dqkv, &wide(&qkv), &dqk, f, 5e-7); // 8.0e-8
}

/// Causal attention by its definition; `x` is `qk`, then `qkv`.
fn attention_f64(h: Heads, bounds: &[usize], x: &[f64]) -> Vec<f64> {
    let tokens = bounds[bounds.len() - 1];
    let (qk, qkv) = x.split_at(tokens * h.qk());
    let mut out = vec![0.0; tokens * h.q()];
    for row in bounds.windows(2) {
        for t in row[0]..row[1] {
            for head in 0..h.query {
                let kv = head / (h.query / h.kv);
                let q = &qk[t * h.qk() + head * h.dim..][..h.dim];
                let weights: Vec<f64> = (row[0]..=t)
                    .map(|s| {
                        let k = &qk[s * h.qk() + h.q() + kv * h.dim..][..h.dim];
                        let score: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        (score / (h.dim as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for (s, w) in (row[0]..).zip(weights) {
                    let v = &qkv[s * h.qkv() + h.qk() + kv * h.dim..][..h.dim];
                    for (o, v) in out[t * h.q() + head * h.dim..][..h.dim].iter_mut().zip(v) {
                        *o += w / total * v;
                    }
                }
            }
        }
    }
    out
}

#[test]
fn attention_and_its_cache() {
    let h = HEADS;
    // One token; a block exactly; past two blocks.
    let rows = Ragged::new(&Cpu, &[(0, 1), (1, 64), (2, 5), (3, 300)]).unwrap();
    let tokens = rows.tokens();
    let mut draw = Draw(6);
    let mut qk = draw.vec(tokens * h.qk());
    qk.iter_mut().for_each(|x| *x *= 3.0);
    let (qkv, dout) = (draw.vec(tokens * h.qkv()), draw.vec(tokens * h.q()));
    let x = [wide(&qk), wide(&qkv)].concat();
    let f = |x: &[f64]| attention_f64(h, rows.bounds(), x);
    let (mut out, mut lse) = (vec![0.0; tokens * h.q()], vec![0.0; tokens * h.query]);
    let mut ws = scratch(Cpu.attention_scratch(h, rows.longest()));
    Cpu.attention(h, &rows, &qk, &qkv, &mut out, &mut lse, &mut ws);
    near("attention", &out, &f(&x), 2e-6); // 1.2e-6

    let mut dqkv = vec![f32::NAN; tokens * h.qkv()];
    Cpu.attention_backward(
        h,
        &rows,
        (&qk, &qkv),
        (&out, &lse),
        &dout,
        &mut dqkv,
        &mut ws,
    );
    // By qk (queries, keys), then by qkv, where only the values count.
    let mut got = Vec::new();
    for row in dqkv.chunks(h.qkv()) {
        got.extend_from_slice(&row[..h.qk()]);
    }
    for row in dqkv.chunks(h.qkv()) {
        got.extend(std::iter::repeat_n(0.0, h.qk()));
        got.extend_from_slice(&row[h.qk()..]);
    }
    check_gradient("attention's dqkv", &got, &x, &dout, f, 1e-6); // 2.3e-7

    // The last token of each row, from a cache filled with the others.
    let cache = Cache {
        slots: 5,
        capacity: 301,
    };
    let len = cache.slots * cache.capacity * h.k();
    let (mut keys, mut values) = (draw.vec(len), draw.vec(len));
    let slot_of = |row: usize| [4, 0, 3, 1][row];
    let slots: Vec<u32> = rows.rows.iter().map(|&r| slot_of(r as usize)).collect();
    let at = (&slots, &rows.positions, tokens);
    Cpu.cache_append(h, cache, at, &qk, &qkv, (&mut keys, &mut values));
    let last: Vec<usize> = rows.bounds()[1..].iter().map(|b| b - 1).collect();
    let pick = |x: &[f32], width: usize| -> Vec<f32> {
        last.iter()
            .flat_map(|&t| x[t * width..][..width].to_vec())
            .collect()
    };
    let slots: Vec<u32> = last.iter().map(|&t| slots[t]).collect();
    let positions: Vec<u32> = last.iter().map(|&t| rows.positions[t]).collect();
    let mut ws = scratch(Cpu.attention_scratch(h, cache.capacity));
    let mut got = vec![0.0; 4 * h.q()];
    let (at, store) = ((&slots, &positions, 4), (&keys, &values));
    Cpu.cache_attention(h, cache, at, &pick(&qk, h.qk()), store, &mut got, &mut ws);
    near("cached", &got, &wide(&pick(&out, h.q())), 2e-6); // 6.1e-7
}

#[test]
fn head_loss() {
    // Past a chunk of rows; past a widened stretch of the head.
    for (kind, rows, width, vocabulary) in [(0, 600, 13, 37), (1, 21, 33, 1100), (0, 1, 4, 2)] {
        let mut draw = Draw(7);
        let (head, w) = weight(&mut draw, [vocabulary, width], kind);
        let hidden = draw.vec(rows * width);
        let targets = draw.ids(rows, vocabulary as u64);
        let f = |x: &[f64]| -> Vec<f64> {
            let logits = times_transposed(x, &w, width);
            let nll = |(l, &t): (&Vec<f64>, &u32)| {
                l.iter().map(|x| x.exp()).sum::<f64>().ln() - l[t as usize]
            };
            logits.iter().zip(&targets).map(nll).collect()
        };
        let mut ws = scratch(Cpu.head_scratch(&head, rows));
        let (mut nll, mut dhidden) = (vec![0.0; rows], vec![0.0; hidden.len()]);
        let inputs = (&hidden, &targets, rows);
        Cpu.head_loss(&head, inputs, &mut nll, Some((&mut dhidden, 0.25)), &mut ws);
        near("nll", &nll, &f(&wide(&hidden)), 1e-6); // 3.0e-7
        check_gradient(
            "dhidden",
            &dhidden,
            &wide(&hidden),
            &vec![0.25; rows],
            f,
            3e-6, // 7.5e-7
        );
        let mut alone = vec![0.0; rows];
        Cpu.head_loss(&head, inputs, &mut alone, None, &mut ws);
        assert_eq!(alone, nll);
        let mut logits = vec![0.0; rows * vocabulary];
        Cpu.logits(&head, (&hidden, rows), &mut logits, &mut ws);
        let want = times_transposed(&wide(&hidden), &w, width).concat();
        near("logits", &logits, &want, 1e-6); // 3.3e-7
    }
}

#[test]
fn rows_are_looked_up_picked_and_put_back() {
    let mut draw = Draw(8);
    for kind in 0..3 {
        let (table, values) = weight(&mut draw, [50, 9], kind);
        let ids = draw.ids(30, 50);
        let mut out = vec![0.0; 30 * 9];
        Cpu.embed(&table, &ids, 30, &mut out);
        for (out, &id) in out.chunks(9).zip(&ids) {
            assert_eq!(wide(out), values[id as usize * 9..][..9]);
        }
    }
    let x = draw.vec(20 * 3);
    let index = vec![19, 4, 7];
    let mut picked = vec![0.0; 9];
    Cpu.gather(&x, &index, [3, 3], &mut picked);
    assert_eq!(picked, [&x[57..60], &x[12..15], &x[21..24]].concat());
    let mut back = vec![f32::NAN; 60];
    Cpu.scatter(&picked, &index, [3, 20, 3], &mut back);
    for (i, (back, x)) in back.chunks(3).zip(x.chunks(3)).enumerate() {
        let want = if index.contains(&(i as u32)) {
            x
        } else {
            &[0.0; 3]
        };
        assert_eq!(back, want);
    }
}

#[test]
fn optimiser() {
    // Long enough for several tasks and branches of the norm's tree.
    let len = 100_003;
    let mut draw = Draw(9);
    let mut params = draw.vec(len);
    let stretches = [
        Stretch {
            range: 0..40_000,
            lr: 1e-2,
            decay: 0.1,
        },
        Stretch {
            range: 40_000..100_000,
            lr: 3e-3,
            decay: 0.0,
        },
    ];
    let mut p = wide(&params);
    let frozen = params[100_000..].to_vec();
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    let (mut fm, mut fv) = (vec![0.0; len], vec![0.0; len]);
    let mut norm = vec![0.0];
    for step in 1..=5 {
        let grads = draw.vec(len);
        // Clipped in odd steps only.
        let max_norm = if step % 2 == 1 { 10.0 } else { 1e6 };
        let settings = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step,
            max_norm: Some(max_norm),
        };
        Cpu.global_norm(&grads, len, &mut norm);
        let g = wide(&grads);
        let true_norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        near("norm", &norm, &[true_norm], 2e-7); // 4.1e-8
        let gradient = (&grads, &norm);
        Cpu.adamw(
            &settings,
            &stretches,
            gradient,
            &mut params,
            (&mut m, &mut v),
        );
        let clip = (f64::from(max_norm) / (true_norm + 1e-6)).min(1.0);
        let t = step as i32;
        for s in &stretches {
            for i in s.range.clone() {
                let g = g[i] * clip;
                fm[i] = 0.9 * fm[i] + 0.1 * g;
                fv[i] = 0.999 * fv[i] + 0.001 * g * g;
                let hat = (
                    fm[i] / (1.0 - 0.9_f64.powi(t)),
                    fv[i] / (1.0 - 0.999_f64.powi(t)),
                );
                p[i] -= s.lr * (s.decay * p[i] + hat.0 / (hat.1.sqrt() + 1e-8));
            }
        }
    }
    near("params", &params, &p, 1e-6); // 4.5e-7
    assert_eq!(params[100_000..], frozen);
}

#[test]
fn greedy_sampling_takes_the_first_of_the_best() {
    let logits = vec![0.0, 3.0, -1.0, 3.0, /**/ 5.0, 1.0, 2.0, 4.9];
    let how = Sampling::GREEDY;
    let mut out = vec![9; 2];
    let keys = vec![0, 1];
    let mut ws = scratch(16 * 4);
    Cpu.sample(&how, (&logits, [2, 4]), (&keys, &keys), &mut out, &mut ws);
    assert_eq!(out, [1, 0]);
}

/// Frequencies of 20,000 draws against the probabilities, by five standard deviations.
#[test]
fn sampling_follows_the_truncated_softmax() {
    let logits = [1.0_f32, 2.5, 0.0, 2.0, -1.0, 1.5];
    for (top_k, top_p, allowed) in [
        (0, 1.0, &[0, 1, 2, 3, 4, 5][..]),
        (3, 1.0, &[1, 3, 5]),
        // At temperature 0.8 the best three hold 0.492, 0.263 and 0.141.
        (0, 0.76, &[1, 3, 5]),
        (0, 0.75, &[1, 3]),
        (2, 0.99, &[1, 3]),
        (1, 1.0, &[1]),
        (0, 1e-6, &[1]),
    ] {
        let how = Sampling {
            temperature: 0.8,
            top_k,
            top_p,
            seed: 1,
        };
        let draws = 20_000;
        let rows: Vec<f32> = std::iter::repeat_n(logits, draws).flatten().collect();
        let items: Vec<u32> = (0..draws as u32).map(|i| i / 100).collect();
        let positions: Vec<u32> = (0..draws as u32).map(|i| i % 100).collect();
        let mut out = vec![0; draws];
        let mut ws = scratch(2 * 4 * rows.len());
        Cpu.sample(
            &how,
            (&rows, [draws, 6]),
            (&items, &positions),
            &mut out,
            &mut ws,
        );
        let weight = |i: usize| (f64::from(logits[i]) / 0.8).exp();
        let total: f64 = allowed.iter().map(|&i| weight(i)).sum();
        for i in 0..6 {
            let p = if allowed.contains(&i) {
                weight(i) / total
            } else {
                0.0
            };
            let count = out.iter().filter(|&&o| o as usize == i).count() as f64;
            let sd = (draws as f64 * p * (1.0 - p)).sqrt();
            let expected = draws as f64 * p;
            assert!(
                (count - expected).abs() <= 5.0 * sd,
                "{i}: {count}, not {expected}"
            );
        }
    }
}

/// Shapes of many tiles and tasks: one thread and seven give the same bits.
#[test]
fn large_shapes_do_not_depend_on_threads() {
    let (tokens, inputs, outputs) = (600, 70, 1100);
    let run = || {
        let mut draw = Draw(10);
        let (w, _) = weight(&mut draw, [outputs, inputs], 2);
        let adapter = Adapter {
            rank: 4,
            scale: 1.0,
            a: 0,
            b: 4 * inputs,
            module: 0,
            dora: None,
        };
        let members = [Member {
            weight: &w,
            adapter: Some(adapter),
        }];
        let group = Group {
            layer: 0,
            members: &members,
        };
        let params = draw.vec(4 * (inputs + outputs));
        let (x, dout) = (draw.vec(tokens * inputs), draw.vec(tokens * outputs));
        let mut ws = scratch(Cpu.linear_scratch(&[&w], [tokens, 4], false));
        let (mut out, mut xa) = (vec![0.0; tokens * outputs], vec![0.0; tokens * 4]);
        let input = (&x, tokens);
        Cpu.linear(
            &group,
            Some(&params),
            None,
            input,
            None,
            &mut out,
            &mut xa,
            &mut ws,
        );
        let (mut dx, mut grads) = (vec![0.0; x.len()], vec![0.0; params.len()]);
        let want = LinearGrad {
            dx: Some(&mut dx),
            grads: Some(&mut grads),
        };
        Cpu.linear_backward(
            &group,
            Some(&params),
            None,
            input,
            &xa,
            &dout,
            want,
            &mut ws,
        );
        let mut norm = vec![0.0];
        Cpu.global_norm(&dout, dout.len(), &mut norm);
        [out, xa, dx, grads, norm]
    };
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(run)
    };
    assert!(on(1) == on(7));
}
