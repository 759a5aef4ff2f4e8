//! Where each adapter's factors lie in the one flat buffer that is trained.
//!
//! A run's parameters, gradients and moments are three buffers with the same
//! layout, so the optimiser, the norm and a checkpoint each see one array. The
//! factors `A` of modules that share an input follow each other: with no dropout
//! between them, their products are one.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use engine::Backend;
use engine::rng::{Purpose, Stream, unit_f32};

use crate::{Config, Module, Pair};

/// The modules that share an input, in the order in which a layer computes them.
pub(crate) const GROUPS: [&[Module]; 4] = [
    &[Module::Q, Module::K, Module::V],
    &[Module::O],
    &[Module::Gate, Module::Up],
    &[Module::Down],
];

/// The adapters of a model and their places in a flat buffer of floats.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayout {
    /// By layer and [`Module::ALL`]'s order.
    adapters: Vec<[Option<engine::Adapter>; 7]>,
    shapes: [[usize; 2]; 7],
    len: usize,
}

impl LoraLayout {
    /// Adapters of one rank on the same modules of every layer, scaled by `scale`
    /// (`alpha / r`, or `alpha / √r` for rsLoRA).
    pub fn new(config: &Config, targets: &BTreeSet<Module>, rank: usize, scale: f32) -> Self {
        let shapes = Module::ALL.map(|m| m.shape(config));
        let mut len = 0;
        let mut reserve = |floats: usize| {
            len += floats;
            len - floats
        };
        let layer = |_| {
            let mut layer = [None; 7];
            for group in GROUPS {
                let trained = || group.iter().filter(|m| targets.contains(m));
                for &module in trained() {
                    layer[module as usize] = Some(engine::Adapter {
                        rank,
                        scale,
                        a: reserve(rank * shapes[module as usize][1]),
                        b: 0,
                        module: module as u32,
                    });
                }
                for &module in trained() {
                    if let Some(adapter) = &mut layer[module as usize] {
                        adapter.b = reserve(shapes[module as usize][0] * rank);
                    }
                }
            }
            layer
        };
        let adapters = (0..config.layers).map(layer).collect();
        Self {
            adapters,
            shapes,
            len,
        }
    }

    /// Floats in all factors: the number of trained parameters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where a module's `A [rank, in]` and `B [out, rank]` lie, if it has an adapter.
    pub fn ranges(&self, layer: usize, module: Module) -> Option<(Range<usize>, Range<usize>)> {
        let adapter = self.adapters[layer][module as usize]?;
        let [out, inputs] = self.shapes[module as usize];
        let (a, b) = (adapter.rank * inputs, out * adapter.rank);
        Some((adapter.a..adapter.a + a, adapter.b..adapter.b + b))
    }

    /// Initial values as peft draws them: `A` uniform in `±1/√in`
    /// (Kaiming-uniform with slope √5), `B` zero. Each value is a function of the
    /// seed, its layer, module, row and column.
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for (layer, module, adapter) in self.iter() {
            let inputs = self.shapes[module as usize][1];
            let bound = 1.0 / (inputs as f32).sqrt();
            let stream = Stream {
                seed,
                purpose: Purpose::Init,
                layer: layer as u32,
                module: module as u32,
            };
            let a = &mut values[adapter.a..adapter.a + adapter.rank * inputs];
            for (row, a) in a.chunks_exact_mut(inputs).enumerate() {
                for (block, a) in a.chunks_mut(4).enumerate() {
                    let bits = stream.bits(row as u32, 0, 0, block as u32);
                    for (a, bits) in a.iter_mut().zip(bits) {
                        *a = (2.0 * unit_f32(bits) - 1.0) * bound;
                    }
                }
            }
        }
        values
    }

    /// The flat buffer of an adapter read from its files.
    ///
    /// # Panics
    /// If the pairs are not those of this layout: build it from the same
    /// adapter's targets and rank.
    pub fn flatten(&self, pairs: &BTreeMap<(usize, Module), Pair>) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for (layer, module, _) in self.iter() {
            let (a, b) = self.ranges(layer, module).expect("iterates over adapters");
            let pair = &pairs[&(layer, module)];
            values[a].copy_from_slice(&pair.a);
            values[b].copy_from_slice(&pair.b);
        }
        values
    }

    /// The reverse of [`flatten`](Self::flatten): factors by layer and module.
    pub fn split(&self, values: &[f32]) -> BTreeMap<(usize, Module), Pair> {
        let pair = |(layer, module, _)| {
            let (a, b) = self.ranges(layer, module).expect("iterates over adapters");
            let pair = Pair {
                a: values[a].to_vec(),
                b: values[b].to_vec(),
            };
            ((layer, module), pair)
        };
        self.iter().map(pair).collect()
    }

    /// Where the factors `(A, B)` of each adapter lie.
    pub(crate) fn factors(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        self.iter()
            .filter_map(|(layer, module, _)| self.ranges(layer, module))
    }

    /// All adapters, layer by layer.
    fn iter(&self) -> impl Iterator<Item = (usize, Module, engine::Adapter)> {
        self.adapters.iter().enumerate().flat_map(|(layer, all)| {
            let present = Module::ALL.into_iter().zip(all);
            present.filter_map(move |(module, adapter)| Some((layer, module, (*adapter)?)))
        })
    }

    /// A module's adapter.
    pub(crate) fn adapter(&self, layer: usize, module: Module) -> Option<engine::Adapter> {
        self.adapters[layer][module as usize]
    }

    /// The widest `x Aᵀ` of each group.
    pub(crate) fn ranks(&self) -> [usize; 4] {
        GROUPS.map(|group| {
            let rank = |layer: &[Option<engine::Adapter>; 7]| -> usize {
                let of = |m: &Module| layer[*m as usize].map_or(0, |a| a.rank);
                group.iter().map(of).sum()
            };
            self.adapters.iter().map(rank).max().unwrap_or(0)
        })
    }

    /// Whether any of a layer's groups `..groups` has an adapter.
    pub(crate) fn trains_any(&self, layer: usize, groups: usize) -> bool {
        let mut modules = GROUPS[..groups].iter().copied().flatten();
        modules.any(|m| self.adapters[layer][*m as usize].is_some())
    }
}

/// An adapter at run time: `None` of it is the base model.
pub struct Lora<'a, B: Backend> {
    /// Where the factors are.
    pub layout: &'a LoraLayout,
    /// The factors.
    pub params: &'a B::F32,
}

impl<B: Backend> Clone for Lora<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Lora<'_, B> {}
