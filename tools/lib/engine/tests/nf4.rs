//! NF4 against bitsandbytes (tests/parity/nf4), against its published error, and
//! against itself read row by row.
#![allow(clippy::unwrap_used)]

use engine::nf4::{Absmax, BLOCK, Error, LEVELS, Nf4Tensor, dynamic_map};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

const REFERENCE: &[u8] = include_bytes!("../../../../tests/parity/nf4/reference.safetensors");

fn reference() -> SafeTensors<'static> {
    SafeTensors::deserialize(REFERENCE).unwrap()
}

fn f32s(name: &str) -> Vec<f32> {
    let tensor = reference().tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    let words = tensor.data().chunks_exact(4);
    words
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn bytes(name: &str) -> Vec<u8> {
    reference().tensor(name).unwrap().data().to_vec()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The case's input, in the type that it is stored in, quantised.
fn quantize(case: &str, double_quant: bool) -> Nf4Tensor {
    let file = reference();
    let input = file.tensor(&format!("{case}.input")).unwrap();
    let shape = [input.shape()[0], input.shape()[1]];
    let halves = || {
        input
            .data()
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    match input.dtype() {
        Dtype::F32 => Nf4Tensor::quantize(shape, &f32s(&format!("{case}.input")), double_quant),
        Dtype::BF16 => {
            let values: Vec<_> = halves().map(bf16::from_bits).collect();
            Nf4Tensor::quantize(shape, &values, double_quant)
        }
        Dtype::F16 => {
            let values: Vec<_> = halves().map(f16::from_bits).collect();
            Nf4Tensor::quantize(shape, &values, double_quant)
        }
        other => panic!("{case}: {other:?}"),
    }
    .unwrap()
}

const CASES: [&str; 8] = [
    "random",
    "bf16",
    "f16",
    "odd",
    "one",
    "ties",
    "reciprocal",
    "extremes",
];

#[test]
fn levels_and_map_are_those_of_bitsandbytes() {
    assert_eq!(bits(&LEVELS), bits(&f32s("levels")));
    assert_eq!(bits(dynamic_map()), bits(&f32s("map")));
}

#[test]
fn codes_and_scales_are_those_of_bitsandbytes() {
    for case in CASES {
        let tensor = quantize(case, false);
        assert_eq!(tensor.packed(), bytes(&format!("{case}.packed")), "{case}");
        let Absmax::Plain(scales) = tensor.absmax() else {
            panic!("{case}")
        };
        assert_eq!(
            bits(scales),
            bits(&f32s(&format!("{case}.absmax"))),
            "{case}"
        );
    }
}

#[test]
fn values_are_those_of_bitsandbytes() {
    let file = reference();
    let cases = CASES.iter().map(|case| (case, format!("{case}.values")));
    let mut compared = 0;
    for (case, values) in cases.filter(|(_, values)| file.tensor(values).is_ok()) {
        let tensor = quantize(case, false);
        let [rows, cols] = tensor.shape();
        let mut ours = vec![f32::NAN; rows * cols];
        tensor.dequantize_into(&mut ours);
        // bitsandbytes rounds to the input's type; so must we, to compare.
        let ours = match file.tensor(&format!("{case}.input")).unwrap().dtype() {
            Dtype::F16 => ours.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
            _ => ours,
        };
        assert_eq!(ours, f32s(&values), "{case}");
        compared += ours.len();
    }
    assert!(compared > 3_000, "{compared} values were compared");
}

#[test]
fn nested_scales_take_the_nearest_code() {
    for case in ["random", "bf16", "f16", "odd", "one", "ties", "scales"] {
        let scales = match case {
            "scales" => f32s("scales.input"),
            _ => f32s(&format!("{case}.absmax")),
        };
        let offset = f32s(&format!("{case}.offset"))[0];
        let Absmax::Nested { codes, absmax, .. } = Absmax::nest(&scales, offset) else {
            panic!("{case}")
        };
        assert_eq!(codes, bytes(&format!("{case}.nested_codes")), "{case}");
        assert_eq!(
            bits(&absmax),
            bits(&f32s(&format!("{case}.nested_absmax"))),
            "{case}"
        );
    }
}

/// As the CUDA kernel searches: halving steps through the sorted map, then the
/// nearer of two neighbours. Written from its description, for want of a GPU.
fn searched(map: &[f32; 256], x: f32) -> u8 {
    let (mut pivot, mut lower, mut upper) = (127, 0, 255);
    for step in [64, 32, 16, 8, 4, 2, 1] {
        if x > map[pivot] {
            lower = pivot;
            pivot += step;
        } else {
            upper = pivot;
            pivot -= step;
        }
    }
    let code = if x > map[pivot] {
        let halfway = (map[upper] + map[pivot]) * 0.5;
        if x > halfway { upper } else { pivot }
    } else {
        let halfway = (map[lower] + map[pivot]) * 0.5;
        if x < halfway { lower } else { pivot }
    };
    code as u8
}

#[test]
fn a_scale_half_way_between_codes_goes_where_the_kernel_puts_it() {
    let map = dynamic_map();
    // One block whose largest is 1, so that its scale changes nothing.
    let mut scales: Vec<f32> = map.windows(2).map(|w| (w[0] + w[1]) * 0.5).collect();
    scales.push(1.0);
    let Absmax::Nested { codes, .. } = Absmax::nest(&scales, 0.0) else {
        panic!()
    };
    let expected: Vec<u8> = scales.iter().map(|&x| searched(map, x)).collect();
    assert_eq!(codes, expected);
}

/// The offset is a mean of f32, which torch sums in another order: one unit in
/// the last place is the difference that order can make.
#[test]
fn double_quantisation_takes_the_mean_as_offset() {
    for case in ["random", "bf16", "f16", "odd", "one", "ties"] {
        let tensor = quantize(case, true);
        let &Absmax::Nested { offset, .. } = tensor.absmax() else {
            panic!("{case}")
        };
        let theirs = f32s(&format!("{case}.offset"))[0];
        let apart = offset.to_bits().abs_diff(theirs.to_bits());
        assert!(apart <= 1, "{case}: {offset} and {theirs}");
    }
}

/// A counter hashed to a standard normal deviate (Box–Muller).
fn normal(i: usize) -> f32 {
    let unit = |salt: u64| {
        let mut z = (i as u64)
            .wrapping_add(salt)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let (u, v) = (1.0 - unit(1 << 40), unit(1 << 41));
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// bitsandbytes' own test expects a mean absolute error of 0.072798 (σ 0.000074
/// over tensors of 1024 × 1024) for standard normal input; 7σ, as it allows.
#[test]
fn error_on_normal_input_is_the_published_one() {
    let values: Vec<f32> = (0..1 << 20).map(normal).collect();
    let tensor = Nf4Tensor::quantize([1024, 1024], &values, false).unwrap();
    let mut back = vec![0.0; values.len()];
    tensor.dequantize_into(&mut back);
    let error: f64 = values
        .iter()
        .zip(&back)
        .map(|(a, b)| f64::from((a - b).abs()))
        .sum();
    let mean = error / values.len() as f64;
    assert!((mean - 0.072_798).abs() < 7.0 * 0.000_074, "{mean}");
}

#[test]
fn any_rows_equal_the_same_rows_of_the_whole() {
    // 37 columns: rows begin inside a block and, every other one, inside a byte.
    let values: Vec<f32> = (0..41 * 37).map(normal).collect();
    for double_quant in [false, true] {
        let tensor = Nf4Tensor::quantize([41, 37], &values, double_quant).unwrap();
        let mut whole = vec![0.0; values.len()];
        tensor.dequantize_into(&mut whole);
        for start in 0..41 {
            for end in start..=41 {
                let mut part = vec![f32::NAN; (end - start) * 37];
                tensor.dequantize_rows(start..end, &mut part);
                assert_eq!(
                    bits(&part),
                    bits(&whole[start * 37..end * 37]),
                    "{start}..{end}"
                );
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let values: Vec<f32> = (0..300 * 1000).map(normal).collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let tensor = Nf4Tensor::quantize([300, 1000], &values, true).unwrap();
            let mut back = vec![0.0; values.len()];
            tensor.dequantize_into(&mut back);
            (tensor, bits(&back))
        })
    };
    assert_eq!(run(1), run(8));
}

#[test]
fn storage_is_what_the_paper_says() {
    let tensor = Nf4Tensor::quantize([256, 256], &vec![0.5f32; 1 << 16], true).unwrap();
    let bits = 8.0 * tensor.bytes() as f64 / f64::from(1 << 16);
    // 4 + 8/64 + 32/(64·256), and the offset.
    assert!((bits - 4.127).abs() < 0.001, "{bits} bits a weight");
}

#[test]
fn what_is_not_finite_is_refused_where_it_lies() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![1.0f32; 3 * 100];
        values[2 * 100 + 7] = bad;
        let error = Nf4Tensor::quantize([3, 100], &values, true).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NotFinite {
                    row: 2,
                    column: 7,
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn parts_of_the_wrong_length_are_refused() {
    let plain = |n| Absmax::Plain(vec![1.0; n]);
    let part = |packed, absmax| match Nf4Tensor::from_parts([3, 50], vec![0; packed], absmax) {
        Err(Error::Length { part, .. }) => part,
        other => panic!("{other:?}"),
    };
    assert!(Nf4Tensor::from_parts([3, 50], vec![0; 75], plain(150usize.div_ceil(BLOCK))).is_ok());
    assert_eq!(part(74, plain(3)), "packed");
    assert_eq!(part(75, plain(2)), "absmax");
    let nested = Absmax::Nested {
        codes: vec![0; 3],
        absmax: vec![],
        offset: 0.0,
    };
    assert_eq!(part(75, nested), "nested absmax");
    let short = Nf4Tensor::quantize([3, 50], &[0.0f32; 149], false).unwrap_err();
    assert!(matches!(short, Error::Length { part: "values", .. }));
}
