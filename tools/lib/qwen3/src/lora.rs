//! Where each adapter's factors lie in the one flat buffer that is trained.
//!
//! A run's parameters, gradients and moments are three buffers with the same
//! layout, so the optimiser, the norm and a checkpoint each see one array. The
//! factors `A` of modules that share an input follow each other: with no dropout
//! between them, their products are one. What DoRA computes from the factors, the
//! rows' norms, lies behind all that is trained, where only products look.

use std::collections::BTreeMap;
use std::ops::Range;

use engine::rng::{Purpose, Stream, unit_f32};
use engine::{Backend, Dora};

use crate::targets::Strength;
use crate::{AdapterConfig, Config, Module, Pair, Unfit};

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
    /// What is trained.
    len: usize,
    /// With the norms.
    buffer_len: usize,
}

impl LoraLayout {
    /// Places for the pairs that an adapter has on this model.
    ///
    /// # Errors
    /// If one of its targets or patterns matches nothing.
    pub fn new(model: &Config, adapter: &AdapterConfig) -> Result<Self, Unfit> {
        let strengths = adapter.resolve(model.layers)?;
        let shapes = Module::ALL.map(|m| m.shape(model));
        let mut end = 0;
        let mut reserve = |floats: usize| {
            end += floats;
            end - floats
        };
        let mut adapters = vec![[None; 7]; model.layers];
        for (layer, places) in adapters.iter_mut().enumerate() {
            for group in GROUPS {
                let strength = |&m: &Module| Some((m as usize, *strengths.get(&(layer, m))?));
                let trained: Vec<_> = group.iter().filter_map(strength).collect();
                let all = || trained.iter().copied();
                let a: Vec<_> = all()
                    .map(|(m, of)| reserve(of.rank * shapes[m][1]))
                    .collect();
                let b: Vec<_> = all()
                    .map(|(m, of)| reserve(shapes[m][0] * of.rank))
                    .collect();
                for (i, (module, Strength { rank, scale })) in all().enumerate() {
                    let magnitude = adapter.dora.then(|| reserve(shapes[module][0]));
                    places[module] = Some(engine::Adapter {
                        rank,
                        scale,
                        a: a[i],
                        b: b[i],
                        module: module as u32,
                        dora: magnitude.map(|magnitude| Dora { magnitude, norm: 0 }),
                    });
                }
            }
        }
        let len = reserve(0);
        for place in adapters.iter_mut().flatten().flatten() {
            if let Some(dora) = &mut place.dora {
                dora.norm = reserve(shapes[place.module as usize][0]);
            }
        }
        let buffer_len = reserve(0);
        Ok(Self {
            adapters,
            shapes,
            len,
            buffer_len,
        })
    }

    /// Floats that are trained: those of all factors, and of DoRA's magnitudes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Floats of the buffer that products read: what is trained, then DoRA's norms.
    pub fn buffer_len(&self) -> usize {
        self.buffer_len
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

    /// Where a module's magnitudes `[out]` lie, if it has any.
    pub fn magnitude(&self, layer: usize, module: Module) -> Option<Range<usize>> {
        let at = self.adapters[layer][module as usize]?.dora?.magnitude;
        Some(at..at + self.shapes[module as usize][0])
    }

    /// Initial values as peft draws them: `A` uniform in `±1/√in`
    /// (Kaiming-uniform with slope √5), `B` zero. Each value is a function of the
    /// seed, its layer, module, row and column. Magnitudes are zero: they depend on
    /// the base ([`Model::initial`](crate::Model::initial)).
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
    /// adapter's settings.
    pub fn flatten(&self, pairs: &BTreeMap<(usize, Module), Pair>) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for (layer, module, _) in self.iter() {
            let (a, b) = self.ranges(layer, module).expect("iterates over adapters");
            let pair = &pairs[&(layer, module)];
            values[a].copy_from_slice(&pair.a);
            values[b].copy_from_slice(&pair.b);
            if let Some(range) = self.magnitude(layer, module) {
                let magnitude = pair.magnitude.as_ref().expect("an adapter with DoRA");
                values[range].copy_from_slice(magnitude);
            }
        }
        values
    }

    /// The reverse of [`flatten`](Self::flatten): pairs by layer and module.
    pub fn split(&self, values: &[f32]) -> BTreeMap<(usize, Module), Pair> {
        let pair = |(layer, module, adapter): (_, _, engine::Adapter)| {
            let (a, b) = self.ranges(layer, module).expect("iterates over adapters");
            let magnitude = self.magnitude(layer, module);
            let pair = Pair {
                scale: adapter.scale,
                a: values[a].to_vec(),
                b: values[b].to_vec(),
                magnitude: magnitude.map(|range| values[range].to_vec()),
            };
            ((layer, module), pair)
        };
        self.iter().map(pair).collect()
    }

    /// Where each trained tensor lies, in order, and whether it is of those that
    /// LoRA+ trains faster, as peft's groups have it: `B`, and DoRA's magnitudes with it.
    pub(crate) fn tensors(&self) -> Vec<(Range<usize>, bool)> {
        let parts = |(layer, module, _)| {
            let (a, b) = self.ranges(layer, module).expect("iterates over adapters");
            let magnitude = self.magnitude(layer, module).map(|range| (range, true));
            [(a, false), (b, true)].into_iter().chain(magnitude)
        };
        let mut tensors: Vec<_> = self.iter().flat_map(parts).collect();
        tensors.sort_by_key(|(range, _)| range.start);
        tensors
    }

    /// Whether rows are rescaled to learnt lengths.
    pub fn dora(&self) -> bool {
        self.buffer_len > self.len
    }

    /// All adapters, layer by layer.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, Module, engine::Adapter)> {
        self.adapters.iter().enumerate().flat_map(|(layer, all)| {
            let present = Module::ALL.into_iter().zip(all);
            present.filter_map(move |(module, adapter)| Some((layer, module, (*adapter)?)))
        })
    }

    /// A module's adapter.
    pub(crate) fn adapter(&self, layer: usize, module: Module) -> Option<engine::Adapter> {
        self.adapters[layer][module as usize]
    }

    /// What a layer's buffers must hold.
    pub(crate) fn ranks(&self) -> Ranks {
        let groups = GROUPS.map(|group| {
            let rank = |layer: &[Option<engine::Adapter>; 7]| -> usize {
                let of = |m: &Module| layer[*m as usize].map_or(0, |a| a.rank);
                group.iter().map(of).sum()
            };
            self.adapters.iter().map(rank).max().unwrap_or(0)
        });
        let dora = self.dora();
        Ranks { groups, dora }
    }

    /// Whether a layer has an adapter in one of its groups `..groups`, or there is
    /// one in a layer below.
    pub(crate) fn trains_below(&self, layer: usize, groups: usize) -> bool {
        let mut modules = GROUPS[..groups].iter().copied().flatten();
        layer > self.lowest() || modules.any(|m| self.adapters[layer][*m as usize].is_some())
    }

    /// Layers from the lowest with an adapter upwards.
    pub(crate) fn trained_layers(&self) -> usize {
        self.adapters.len() - self.lowest()
    }

    /// The first layer with an adapter.
    pub(crate) fn lowest(&self) -> usize {
        let any = |layer: &[Option<engine::Adapter>; 7]| layer.iter().any(Option::is_some);
        self.adapters
            .iter()
            .position(any)
            .unwrap_or(self.adapters.len())
    }
}

/// What an adapter adds to a pass: the widest `x Aᵀ` of each group, and whether
/// rows are rescaled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ranks {
    pub groups: [usize; 4],
    pub dora: bool,
}

impl Ranks {
    pub fn max(self, other: Self) -> Self {
        Self {
            groups: std::array::from_fn(|i| self.groups[i].max(other.groups[i])),
            dora: self.dora || other.dora,
        }
    }
}

/// An adapter at run time: `None` of it is the base model.
pub struct Lora<'a, B: Backend> {
    /// Where the factors are.
    pub layout: &'a LoraLayout,
    /// The values, as [`Model::adapter_params`](crate::Model::adapter_params) makes them.
    pub params: &'a B::F32,
}

/// An adapter on a device, as [`Model::load_adapter`](crate::Model::load_adapter)
/// puts it there.
pub struct OwnedLora<B: Backend> {
    pub(crate) layout: LoraLayout,
    pub(crate) params: B::F32,
}

impl<B: Backend> OwnedLora<B> {
    /// For passes to borrow.
    pub fn lora(&self) -> Lora<'_, B> {
        Lora {
            layout: &self.layout,
            params: &self.params,
        }
    }
}

impl<B: Backend> Clone for Lora<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Lora<'_, B> {}
