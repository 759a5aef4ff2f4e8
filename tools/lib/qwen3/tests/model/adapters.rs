//! Adapters of every kind against peft, as dumped in tests/parity/adapters: its
//! files in, its logits, losses, gradients and six steps of training out.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use engine::{Cpu, Reading};
use qwen3::{
    Adapter, AdapterConfig, Batch, Checkpoint, Keep, Lora, LoraLayout, Model, Module, Optimiser,
    OptimiserKind, Pass, Row, Storage, Strength, Targets, Update,
};
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::support::{distance, zeros};

#[derive(Deserialize)]
struct Expected {
    cases: BTreeMap<String, Case>,
    weight_decay: f64,
    max_norm: f32,
}

#[derive(Deserialize)]
struct Case {
    nf4: bool,
    lr_ratio: f64,
    nll: Vec<Vec<f32>>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    loss: f32,
    grad_norm: f32,
    lr: f64,
    labelled: usize,
}

#[derive(Deserialize)]
struct TokenRow {
    ids: Vec<u32>,
    labelled: Vec<bool>,
}

/// The rows of tests/parity/train, which these cases are trained on too.
#[derive(Deserialize)]
struct Train {
    rows: Vec<TokenRow>,
}

fn parity(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../tests/parity")
        .join(name)
}

fn json<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&fs::read(parity(name)).unwrap()).unwrap()
}

/// A case and all that it needs.
struct Fixture {
    name: String,
    case: Case,
    rows: Vec<TokenRow>,
    tensors: Vec<u8>,
    model: Model<Cpu>,
    adapter: Adapter,
    layout: LoraLayout,
    weight_decay: f64,
    max_norm: f32,
}

fn fixtures() -> Vec<Fixture> {
    let expected: Expected = json("adapters/expected.json");
    assert_eq!(expected.cases.len(), 5);
    let fixture = |(name, case): (String, Case)| {
        let checkpoint = Checkpoint::open(&parity("train/model")).unwrap();
        let folder = parity("adapters").join(&name);
        let adapter = Adapter::load(&folder, checkpoint.config()).unwrap();
        let storage = match case.nf4 {
            true => Storage::Nf4,
            false => Storage::AsStored,
        };
        Fixture {
            rows: json::<Train>("train/expected.json").rows,
            tensors: fs::read(parity("adapters/expected.safetensors")).unwrap(),
            model: Model::load(Cpu, &checkpoint, storage).unwrap(),
            layout: LoraLayout::new(checkpoint.config(), &adapter.config).unwrap(),
            weight_decay: expected.weight_decay,
            max_norm: expected.max_norm,
            adapter,
            name,
            case,
        }
    };
    expected.cases.into_iter().map(fixture).collect()
}

impl Fixture {
    fn tensor(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let tensor = file.tensor(&format!("{}.{name}", self.name)).ok()?;
        let (values, _) = tensor.data().as_chunks::<4>();
        Some(values.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }

    /// How many tensors of a kind there are in the dump.
    fn count(&self, kind: &str) -> usize {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let prefix = format!("{}.{kind}.", self.name);
        let names = file.names().into_iter();
        names.filter(|name| name.starts_with(&prefix)).count()
    }

    /// Names in the file and places in our buffer of all that is trained.
    fn parts(&self) -> Vec<(String, Range<usize>)> {
        let mut parts = Vec::new();
        for layer in 0..self.model.config().layers {
            for module in Module::ALL {
                let Some((a, b)) = self.layout.ranges(layer, module) else {
                    continue;
                };
                let block = match module {
                    Module::Gate | Module::Up | Module::Down => "mlp",
                    _ => "self_attn",
                };
                let name = format!("base_model.model.model.layers.{layer}.{block}.{module}");
                parts.push((format!("{name}.lora_A.weight"), a));
                parts.push((format!("{name}.lora_B.weight"), b));
                let magnitude = self.layout.magnitude(layer, module);
                parts.extend(magnitude.map(|m| (format!("{name}.lora_magnitude_vector"), m)));
            }
        }
        parts
    }

    /// The largest distance of our values from the dump's, which holds no others.
    fn compare(&self, kind: &str, ours: &[f32]) -> f32 {
        let parts = self.parts();
        assert_eq!(parts.len(), self.count(kind), "{} {kind}", self.name);
        let off = |(name, range): (String, Range<usize>)| {
            let theirs = self.tensor(&format!("{kind}.{name}")).expect(&name);
            distance(&ours[range], &theirs)
        };
        parts.into_iter().map(off).fold(0.0, f32::max)
    }

    /// Rows `first..first + count`, from the start again at the end.
    fn batch(&self, first: usize, count: usize) -> Batch<Cpu> {
        let rows: Vec<_> = (first..first + count)
            .map(|i| Row {
                number: i as u32,
                ids: &self.rows[i % self.rows.len()].ids,
                labelled: &self.rows[i % self.rows.len()].labelled,
            })
            .collect();
        Batch::new(&Cpu, &rows).unwrap()
    }

    fn params(&self) -> Vec<f32> {
        let values = self.layout.flatten(&self.adapter.pairs);
        self.model.adapter_params(&self.layout, &values).unwrap()
    }
}

#[test]
fn logits_and_losses_match_peft() {
    for f in fixtures() {
        let adapter = f.model.load_adapter(&f.adapter).unwrap();
        let logits = f.model.logits(&[&f.rows[0].ids], Some(adapter.lora()));
        let off = distance(&logits.unwrap(), &f.tensor("logits").unwrap());
        let batch = f.batch(0, f.rows.len());
        let mut pass = Pass::new(Keep::Nothing);
        let losses = f.model.losses(&mut pass, &batch, Some(adapter.lora()));
        let nll = distance(&losses.unwrap().wait().unwrap(), &f.case.nll.concat());
        println!("{}: logits off by {off:.1e}, losses by {nll:.1e}", f.name);
        // Measured (2026-11-30) 6.4e-7 and 2.9e-7 at most, with AVX-512, with AVX2 and
        // without either (CPUID masked).
        assert!(off < 3e-6 && nll < 2e-6, "{}: {off:e} {nll:e}", f.name);
    }
}

#[test]
fn training_matches_peft() {
    for f in fixtures() {
        let mut params = f.params();
        let mut grads = zeros(f.layout.len());
        let kind = OptimiserKind {
            eight_bit: false,
            lr_ratio: f.case.lr_ratio,
        };
        let mut optimiser = Optimiser::new(&Cpu, &f.layout, kind).unwrap();
        let mut pass = Pass::new(Keep::All);
        let [mut loss_off, mut norm_off, mut gradient_off] = [0.0_f32; 3];
        for (i, step) in f.case.steps.iter().enumerate() {
            let batch = f.batch(4 * i, 4);
            assert_eq!(batch.labelled(), step.labelled);
            let scale = 1.0 / batch.labelled() as f32;
            let lora = Lora {
                layout: &f.layout,
                params: &params,
            };
            let with = (&mut grads, scale);
            let losses = f
                .model
                .losses_and_gradients(&mut pass, &batch, lora, None, with);
            let loss = losses.unwrap().wait().unwrap().iter().sum::<f32>() * scale;
            if i == 0 {
                gradient_off = f.compare("gradient", &grads);
            }
            let update = Update {
                lr: step.lr,
                weight_decay: f.weight_decay,
                max_norm: Some(f.max_norm),
            };
            let norm = optimiser.update(&Cpu, update, &mut grads, &mut params);
            f.model
                .renew_norms(&mut pass, &f.layout, &mut params)
                .unwrap();
            loss_off = loss_off.max((loss - step.loss).abs() / step.loss);
            norm_off =
                norm_off.max((norm.wait().unwrap()[0] - step.grad_norm).abs() / step.grad_norm);
        }
        let trained_off = f.compare("trained", &params);
        println!(
            "{}: gradients off by {gradient_off:.1e}, losses {loss_off:.1e}, norms {norm_off:.1e}, values at the end {trained_off:.1e}",
            f.name
        );
        // Measured (2026-11-30) at most 2.8e-6, 2.5e-7, 2.0e-6 and 6.7e-6, on the same CPUs.
        assert!(gradient_off < 1e-5, "{}: {gradient_off:e}", f.name);
        assert!(
            loss_off < 1e-6 && norm_off < 5e-6,
            "{}: {loss_off:e} {norm_off:e}",
            f.name
        );
        assert!(trained_off < 3e-5, "{}: {trained_off:e}", f.name);
    }
}

/// Magnitudes start as the lengths of the base's rows, as it is held.
#[test]
fn fresh_magnitudes_are_pefts() {
    let mut seen = 0;
    for f in fixtures().into_iter().filter(|f| f.adapter.config.dora) {
        let values = f.model.initial(&f.layout, 3).unwrap();
        let mut worst = 0.0_f32;
        for (name, range) in f.parts() {
            let Some(theirs) = f.tensor(&format!("initial.{name}")) else {
                assert!(!name.ends_with("magnitude_vector"), "{name}");
                continue;
            };
            worst = worst.max(distance(&values[range], &theirs));
            seen += 1;
        }
        // Measured (2026-11-30) 2.6e-7, on every CPU named above.
        println!("{}: magnitudes off by {worst:.1e}", f.name);
        assert!(worst < 1e-6, "{}: {worst:e}", f.name);
        // So that it changes nothing yet: with B = 0 the adapter is the base, to the bit,
        // for a magnitude and its norm are the same sum.
        let params = f.model.adapter_params(&f.layout, &values).unwrap();
        let lora = Lora {
            layout: &f.layout,
            params: &params,
        };
        let ids: &[u32] = &f.rows[1].ids;
        let [with, without] = [Some(lora), None].map(|l| f.model.logits(&[ids], l).unwrap());
        assert!(with == without, "{}", f.name);
    }
    assert_eq!(seen, 14 + 14 + 4);
}

/// Recomputation sees the same norms, and a pass may be fresh or used.
#[test]
fn recomputation_gives_the_same_bits() {
    for f in fixtures().into_iter().filter(|f| f.adapter.config.dora) {
        let params = f.params();
        let run = |keep| {
            let mut pass = Pass::new(keep);
            let mut grads = zeros(f.layout.len());
            let lora = Lora {
                layout: &f.layout,
                params: &params,
            };
            for batch in [f.batch(0, 1), f.batch(1, 5)] {
                let with = (&mut grads, 0.1);
                f.model
                    .losses_and_gradients(&mut pass, &batch, lora, None, with)
                    .unwrap();
            }
            grads
        };
        assert_eq!(run(Keep::All), run(Keep::Layers(0)), "{}", f.name);
    }
}

/// What peft's rules give for names, patterns and their order, by its own words:
/// `re.fullmatch` for a text, ends of names for a list, and for patterns the first
/// key that matches from the start or behind a dot.
#[test]
fn patterns_mean_what_they_mean_in_peft() {
    let checkpoint = Checkpoint::open(&parity("train/model")).unwrap();
    let resolve = |config: &AdapterConfig| config.resolve(checkpoint.config().layers);
    let names = |names: &[&str]| Targets::Names(names.iter().map(|&n| n.into()).collect());
    let config = AdapterConfig {
        targets: names(&[
            "0.self_attn.q_proj",
            "up_proj",
            "model.layers.1.mlp.down_proj",
        ]),
        rank_pattern: vec![("mlp.up_proj".into(), 9), ("up_proj|q_proj".into(), 5)],
        alpha_pattern: vec![(r"^model\.layers\.1\..*".into(), 3.0)],
        ..AdapterConfig::new(4, 8.0)
    };
    let found = resolve(&config).unwrap();
    let strength = |rank, scale| Strength { rank, scale };
    let want = BTreeMap::from([
        ((0, Module::Q), strength(5, 8.0 / 5.0)),
        ((0, Module::Up), strength(9, 8.0 / 9.0)),
        ((1, Module::Up), strength(9, 3.0 / 9.0)),
        ((1, Module::Down), strength(4, 3.0 / 4.0)),
    ]);
    assert_eq!(found, want);

    for (targets, words) in [
        (names(&["q_proj", "proj"]), "`proj`, which matches nothing"),
        (
            names(&["elf_attn.q_proj"]),
            "`elf_attn.q_proj`, which matches nothing",
        ),
        (names(&["lm_head"]), "`lm_head`, which matches nothing"),
        (names(&[]), "is empty"),
        (
            Targets::from_text("q_proj"),
            "`q_proj` matches nothing: a text is a regular",
        ),
        (Targets::from_text(".*_proj|lm_head"), "matches lm_head too"),
        (
            Targets::from_text(".*q_(proj|norm)"),
            "matches model.layers.0.self_attn.q_norm too",
        ),
        (
            Targets::from_text(".*q_(proj"),
            "`.*q_(proj`, no regular expression",
        ),
    ] {
        let config = AdapterConfig {
            targets,
            ..AdapterConfig::new(4, 8.0)
        };
        let error = resolve(&config).unwrap_err();
        assert_eq!(error.key, "target_modules");
        assert!(error.reason.contains(words), "{error} lacks {words}");
    }
    let all = Targets::from_text("All-Linear");
    assert_eq!(all, Targets::all_linear());
    for pattern in ["x_proj", "k_proj", "q_pro", "(q_proj"] {
        let config = AdapterConfig {
            targets: names(&["q_proj"]),
            rank_pattern: vec![(pattern.into(), 2)],
            ..AdapterConfig::new(4, 8.0)
        };
        let error = resolve(&config).unwrap_err();
        assert_eq!(error.key, "rank_pattern");
        assert!(error.reason.contains(&format!("`{pattern}`")), "{error}");
    }
}
