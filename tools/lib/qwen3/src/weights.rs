//! The weights of a checkpoint in Hugging Face layout: `model.safetensors`, or
//! the shards that `model.safetensors.index.json` names.
//!
//! Opening checks every tensor's presence, type and shape, so that a wrong file
//! is told before minutes of work; reading then goes a layer at a time out of a
//! memory map, so that an 8B model is quantised without ever being whole in
//! memory. A checkpoint that bitsandbytes stored in 4 bits loads as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use engine::nf4::{self, Absmax, BLOCK, NESTED_BLOCK, Nf4Tensor};
use engine::{HostMatrix, MatrixKind};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::config::{Config, Keys, Module};
use crate::error::{Error, Result, open, read, refuse_pointer};
use crate::fingerprint::{digest, hex};
use crate::weight::{Stored, Values, Weight};

pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SINGLE: &str = "model.safetensors";
/// How weights were saved before safetensors.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const LM_HEAD: &str = "lm_head.weight";

/// What a product's name is followed by where bitsandbytes stored it.
const QUANTIZED_PARTS: [&str; 5] = [
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
];

/// How a weight is to be held. One that is stored in 4 bits stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In the checkpoint's own type (f16, which nothing here computes in, as f32).
    AsStored,
    /// NF4 with double quantisation.
    Nf4,
}

/// How a model's weights are to be held. Embeddings and norms stay as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The seven products of each layer.
    pub products: Storage,
    /// lm_head. Where it is tied, NF4 makes a copy of the embedding table.
    pub head: Storage,
}

impl Held {
    /// How a weight is.
    pub(crate) fn of(&self, weight: Weight) -> Storage {
        match weight {
            Weight::Product(..) => self.products,
            Weight::Head => self.head,
            _ => Storage::AsStored,
        }
    }
}

impl From<Storage> for Held {
    /// The products so, lm_head as it is stored.
    fn from(products: Storage) -> Self {
        let head = Storage::AsStored;
        Self { products, head }
    }
}

/// One layer's weights, their products as `M`.
#[derive(Debug, Clone)]
pub struct LayerWeights<M = HostMatrix> {
    /// Before attention: `[hidden]`.
    pub input_norm: Vec<f32>,
    /// Before the MLP: `[hidden]`.
    pub post_attention_norm: Vec<f32>,
    /// On each query head: `[head_dim]`.
    pub q_norm: Vec<f32>,
    /// On each key head: `[head_dim]`.
    pub k_norm: Vec<f32>,
    /// The products, `[out, in]` each, in the order of [`Module::ALL`].
    pub products: [M; 7],
}

/// A checkpoint that has been found complete.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    /// In which shard each tensor is.
    tensors: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where the tensors' bytes begin.
    start: usize,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let unreadable = |source| Error::Read {
            path: path.clone(),
            source,
        };
        let file = open(&path)?;
        // SAFETY: nothing here writes to a model's files; another process that
        // shortens one while it is in use ends this one with SIGBUS, as it would
        // any program that maps weights.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        refuse_pointer(&path, &map)?;
        let (size, header) = SafeTensors::read_metadata(&map).map_err(|error| {
            let reason = match error {
                SafeTensorError::MetadataIncompleteBuffer
                | SafeTensorError::HeaderTooSmall
                | SafeTensorError::InvalidHeaderLength => {
                    format!(
                        "is {} bytes, not as long as its header says: a download cut short?",
                        map.len()
                    )
                }
                other => format!("is not a safetensors file: {other}"),
            };
            Error::file(&path, reason)
        })?;
        Ok(Self {
            path,
            map,
            header,
            start: size + 8,
        })
    }

    /// Lets the system take back the pages that were read. They count as this
    /// process's memory otherwise: a base read once is 16 GB of them.
    fn release(&self) {
        // SAFETY: the map is of a file and only read, so a page that is touched
        // again holds what it held. A system that does not take the advice loses nothing.
        let _ = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (from, to) = info.data_offsets;
        &self.map[self.start + from..self.start + to]
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `folder` and checks that it is whole.
    ///
    /// # Errors
    /// If `config.json` is refused ([`Config::load`]), a file is missing or cut
    /// short, or a tensor is missing, unexpected, or of another type or shape.
    pub fn open(folder: &Path) -> Result<Self> {
        let keys = Keys::read(folder.join("config.json"))?;
        let config = Config::from_keys(&keys)?;
        let (shards, tensors) = open_shards(folder)?;
        let checkpoint = Self {
            folder: folder.into(),
            config,
            shards,
            tensors,
        };
        checkpoint.check(&keys)?;
        Ok(checkpoint)
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How a weight is stored: `BF16`, `F32`, `F16` or `NF4`.
    ///
    /// # Errors
    /// If it is lm_head and tied.
    pub fn storage(&self, weight: Weight) -> Result<String> {
        Ok(match self.dtype(weight)? {
            Dtype::U8 => "NF4".into(),
            dtype => format!("{dtype:?}"),
        })
    }

    /// The type of a weight's values in the file, or of its 4-bit codes: `U8`.
    pub(crate) fn dtype(&self, weight: Weight) -> Result<Dtype> {
        Ok(self.info(&weight.name())?.1.dtype)
    }

    /// The values of one weight, for reading a few rows at a time.
    ///
    /// # Errors
    /// If it is stored in 4 bits and malformed, or is lm_head and tied.
    pub fn values(&self, weight: Weight) -> Result<Values<'_>> {
        self.release(); // what was read of the weight before
        let (name, shape) = (weight.name(), weight.shape(&self.config));
        let (shard, info) = self.info(&name)?;
        let [rows, cols] = [
            if shape.len() == 1 { 1 } else { shape[0] },
            shape[shape.len() - 1],
        ];
        let stored = if info.dtype == Dtype::U8 {
            let (packed, absmax) = self.quantized_parts(&name, [rows, cols])?;
            let tensor = Nf4Tensor::from_parts([rows, cols], packed.to_vec(), absmax);
            Stored::Nf4(tensor.map_err(|e| Error::tensor(&shard.path, &name, e.to_string()))?)
        } else {
            Stored::Floats(info.dtype, shard.bytes(info))
        };
        Ok(Values { stored, rows, cols })
    }

    /// The embedding table, `[vocab, hidden]`.
    ///
    /// # Errors
    /// None once the checkpoint is open.
    pub fn embedding(&self) -> Result<HostMatrix> {
        self.dense(EMBEDDING)
    }

    /// lm_head, `[vocab, hidden]`; none where the embedding table serves as such.
    ///
    /// # Errors
    /// None once the checkpoint is open.
    pub fn lm_head(&self) -> Result<Option<HostMatrix>> {
        let untied = !self.config.tied;
        untied.then(|| self.dense(LM_HEAD)).transpose()
    }

    /// lm_head held as `storage` says, quantised by `quantize`; none where the
    /// embedding table serves as such.
    ///
    /// # Errors
    /// If it is to be quantised and holds NaN or an infinity, or the device has no room.
    pub fn lm_head_by(
        &self,
        storage: Storage,
        quantize: impl Fn(&HostMatrix) -> engine::Result<Nf4Tensor>,
    ) -> Result<Option<HostMatrix>> {
        let stored = if self.config.tied { EMBEDDING } else { LM_HEAD };
        match storage {
            Storage::AsStored => self.lm_head(),
            Storage::Nf4 => self.quantize(stored, quantize).map(Some),
        }
    }

    /// The norm before lm_head, `[hidden]`.
    ///
    /// # Errors
    /// None once the checkpoint is open.
    pub fn final_norm(&self) -> Result<Vec<f32>> {
        self.vector(FINAL_NORM)
    }

    /// Layer `index`, its products held as `storage` says; what is to be quantised
    /// is so on all threads of the current pool.
    ///
    /// # Errors
    /// As [`layer_by`](Self::layer_by).
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, index: usize, storage: Storage) -> Result<LayerWeights> {
        self.layer_by(index, storage, |matrix| Ok(matrix.quantize()?))
    }

    /// [`layer`](Self::layer), quantised by `quantize`: a device, say
    /// ([`Backend::quantize`](engine::Backend::quantize)).
    ///
    /// # Errors
    /// If a product to be quantised holds NaN or an infinity, one that is stored
    /// quantised has a malformed state, or the device has no room.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer_by(
        &self,
        index: usize,
        storage: Storage,
        quantize: impl Fn(&HostMatrix) -> engine::Result<Nf4Tensor> + Sync,
    ) -> Result<LayerWeights> {
        assert!(
            index < self.config.layers,
            "layer {index} of {}",
            self.config.layers
        );
        let product = |module: Module| {
            let name = product_name(index, module);
            if self.info(&name)?.1.dtype == Dtype::U8 {
                return self.quantized(&name, module.shape(&self.config));
            }
            match storage {
                Storage::AsStored => self.dense(&name),
                Storage::Nf4 => self.quantize(&name, &quantize),
            }
        };
        let norm = |name| self.vector(&format!("model.layers.{index}.{name}.weight"));
        // Side by side: copying out of the map and the scales of scales take one thread
        // each. The first error in the order of the products is told, not in that of time.
        let products: Vec<Result<_>> = Module::ALL.into_par_iter().map(product).collect();
        let products: Vec<_> = products.into_iter().collect::<Result<_>>()?;
        let weights = LayerWeights {
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            q_norm: norm("self_attn.q_norm")?,
            k_norm: norm("self_attn.k_norm")?,
            products: (products.try_into()).expect("as many products as there are modules"),
        };
        self.release();
        Ok(weights)
    }

    /// A weight's shape and storage without its values, as a model loaded with
    /// `held` holds it.
    ///
    /// # Errors
    /// If it is lm_head, tied, and not to be quantised.
    pub(crate) fn hollow(&self, weight: Weight, held: Held) -> Result<HostMatrix> {
        let (name, shape) = (weight.name(), weight.shape(&self.config));
        let storage = held.of(weight);
        let shape = [shape[0], shape[1]];
        let stored = self.info(&name).map(|(_, info)| info.dtype);
        let kind = match (stored, storage) {
            (Ok(Dtype::U8), _) => {
                // As loading has it, which holds some scales plain.
                let (_, absmax) = self.quantized_parts(&name, shape)?;
                let nested = matches!(absmax, Absmax::Nested { .. });
                MatrixKind::Nf4 { nested }
            }
            (_, Storage::Nf4) => MatrixKind::Nf4 { nested: true },
            (Ok(Dtype::BF16), _) => MatrixKind::Bf16,
            (Ok(_), _) => MatrixKind::F32,
            (Err(missing), _) => return Err(missing),
        };
        Ok(HostMatrix::hollow(shape, kind))
    }

    /// A name for exactly these weights: SHA-256, in hex, over the digests of
    /// `config.json` and of each weight file in order of their names, a digest
    /// being that of the digests of each 16 MiB. Renaming the folder keeps it;
    /// resharding does not. Reads every byte once, on all threads of the pool.
    ///
    /// # Errors
    /// If `config.json` has gone.
    pub fn fingerprint(&self) -> Result<String> {
        let mut whole = Sha256::new();
        whole.update(digest(&read(&self.folder.join("config.json"))?));
        for shard in &self.shards {
            whole.update(digest(&shard.map));
            shard.release();
        }
        Ok(hex(&whole.finalize()))
    }

    fn info(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        let shard = self.tensors.get(name).map(|&i| &self.shards[i]);
        let found = shard.and_then(|shard| Some((shard, shard.header.info(name)?)));
        found.ok_or_else(|| Error::tensor(&self.folder, name, "is missing"))
    }

    /// Every tensor that the model needs is there as it should be, and none else.
    fn check(&self, keys: &Keys) -> Result<()> {
        let Config {
            vocab_size,
            hidden_size,
            head_dim,
            layers,
            tied,
            ..
        } = self.config;
        let stored_head = self.tensors.contains_key(LM_HEAD);
        let mut dense = vec![
            (EMBEDDING.to_owned(), vec![vocab_size, hidden_size]),
            (FINAL_NORM.to_owned(), vec![hidden_size]),
        ];
        if !tied || stored_head {
            dense.push((LM_HEAD.into(), vec![vocab_size, hidden_size]));
        }
        let mut known = BTreeSet::new();
        for layer in 0..layers {
            for (norm, width) in [
                ("input_layernorm", hidden_size),
                ("post_attention_layernorm", hidden_size),
                ("self_attn.q_norm", head_dim),
                ("self_attn.k_norm", head_dim),
            ] {
                dense.push((format!("model.layers.{layer}.{norm}.weight"), vec![width]));
            }
            for module in Module::ALL {
                let name = product_name(layer, module);
                let shape = module.shape(&self.config);
                if self.info(&name)?.1.dtype == Dtype::U8 {
                    self.quantized_parts(&name, shape)?;
                    known.extend(QUANTIZED_PARTS.map(|part| format!("{name}.{part}")));
                    known.insert(name);
                } else {
                    dense.push((name, shape.into()));
                }
            }
        }
        for (name, shape) in dense {
            self.check_dense(&name, &shape)?;
            known.insert(name);
        }
        let quantized = known.iter().any(|name| name.ends_with(".absmax"));
        if !quantized && keys.has("quantization_config") {
            return Err(keys.wrong(
                "quantization_config",
                "is set, but no tensor is in bitsandbytes' 4-bit form, the only one supported",
            ));
        }
        if tied && stored_head && self.dense_bytes(LM_HEAD)? != self.dense_bytes(EMBEDDING)? {
            let reason = "differs from the embedding table, though config.json ties them (`tie_word_embeddings`)";
            return Err(Error::tensor(&self.folder, LM_HEAD, reason));
        }
        // Old exports keep the rotary frequencies, which follow from the config.
        let odd = self
            .tensors
            .keys()
            .find(|name| !known.contains(*name) && !name.ends_with("rotary_emb.inv_freq"));
        match odd {
            Some(name) => Err(Error::tensor(
                &self.info(name)?.0.path,
                name,
                "is unexpected: a dense Qwen3 of this shape has no such weight",
            )),
            None => Ok(()),
        }
    }

    fn check_dense(&self, name: &str, shape: &[usize]) -> Result<()> {
        let (shard, info) = self.info(name)?;
        let wrong = |reason| Err(Error::tensor(&shard.path, name, reason));
        if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return wrong(format!("is {:?}, not F32, BF16 or F16", info.dtype));
        }
        if info.shape != shape {
            return wrong(format!(
                "has the shape {:?}, not {shape:?} as config.json asks",
                info.shape
            ));
        }
        Ok(())
    }

    fn release(&self) {
        self.shards.iter().for_each(Shard::release);
    }

    fn dense_bytes(&self, name: &str) -> Result<&[u8]> {
        let (shard, info) = self.info(name)?;
        Ok(shard.bytes(info))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (shard, info) = self.info(name)?;
        let bytes = shard.bytes(info);
        Ok(match info.dtype {
            Dtype::BF16 => bf16s(bytes).into_iter().map(bf16::to_f32).collect(),
            Dtype::F16 => f16s(bytes).into_iter().map(f16::to_f32).collect(),
            _ => f32s(bytes),
        })
    }

    fn dense(&self, name: &str) -> Result<HostMatrix> {
        let (shard, info) = self.info(name)?;
        let (rows, cols) = (info.shape[0], info.shape[1]);
        Ok(match info.dtype {
            Dtype::BF16 => HostMatrix::bf16(rows, cols, bf16s(shard.bytes(info))),
            _ => HostMatrix::f32(rows, cols, self.vector(name)?),
        })
    }

    fn quantize(
        &self,
        name: &str,
        quantize: impl Fn(&HostMatrix) -> engine::Result<Nf4Tensor>,
    ) -> Result<HostMatrix> {
        let tensor = quantize(&self.dense(name)?).map_err(|error| match error {
            engine::Error::Unfit(why) => match self.info(name) {
                Ok((shard, _)) => Error::tensor(&shard.path, name, why.to_string()),
                Err(missing) => missing,
            },
            other => other.into(),
        })?;
        Ok(HostMatrix::nf4(tensor))
    }

    fn quantized(&self, name: &str, shape: [usize; 2]) -> Result<HostMatrix> {
        let (packed, absmax) = self.quantized_parts(name, shape)?;
        let tensor = Nf4Tensor::from_parts(shape, packed.to_vec(), absmax);
        tensor
            .map(HostMatrix::nf4)
            .map_err(|error| Error::tensor(&self.folder, name, error.to_string()))
    }

    /// A product in the form in which bitsandbytes' `Linear4bit` is saved: its
    /// codes and scales.
    fn quantized_parts(&self, name: &str, shape: [usize; 2]) -> Result<(&[u8], Absmax)> {
        let (shard, _) = self.info(name)?;
        let wrong = |reason: String| Error::tensor(&shard.path, name, reason);
        let part = |suffix: &str, dtype| {
            let name = format!("{name}.{suffix}");
            let (shard, info) = self.info(&name)?;
            match info.dtype {
                found if found == dtype => Ok(shard.bytes(info)),
                found => Err(Error::tensor(
                    &shard.path,
                    &name,
                    format!("is {found:?}, not {dtype:?}"),
                )),
            }
        };
        let state: QuantState =
            serde_json::from_slice(part("quant_state.bitsandbytes__nf4", Dtype::U8)?)
                .map_err(|error| wrong(format!("has a malformed quant_state: {error}")))?;
        if state.quant_type != "nf4" || state.blocksize != BLOCK || state.shape != shape {
            return Err(wrong(format!(
                "is {} in blocks of {} with the shape {:?}, not nf4 in blocks of {BLOCK} with {shape:?}",
                state.quant_type, state.blocksize, state.shape
            )));
        }
        let levels = f32s(part("quant_map", Dtype::F32)?);
        if levels != nf4::LEVELS {
            return Err(wrong("has a quant_map that is not the NF4 table".into()));
        }
        let absmax = match state.nested_offset {
            None => Absmax::Plain(f32s(part("absmax", Dtype::F32)?)),
            Some(offset) => {
                if state.nested_blocksize != Some(NESTED_BLOCK) {
                    return Err(wrong(format!(
                        "has a nested_blocksize that is not {NESTED_BLOCK}"
                    )));
                }
                let codes = part("absmax", Dtype::U8)?;
                let absmax = f32s(part("nested_absmax", Dtype::F32)?);
                let map = f32s(part("nested_quant_map", Dtype::F32)?);
                restore_scales(codes, absmax, &map, offset)
                    .ok_or_else(|| wrong("has nested scales of the wrong length".into()))?
            }
        };
        let packed = self.dense_bytes(name)?;
        let values = shape[0] * shape[1];
        if packed.len() != values.div_ceil(2) || absmax.blocks() != values.div_ceil(BLOCK) {
            return Err(wrong(format!(
                "holds {} bytes and {} scales, which do not make {shape:?}",
                packed.len(),
                absmax.blocks()
            )));
        }
        Ok((packed, absmax))
    }
}

#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The doubly quantised scales of a file. Its map was computed on another
/// machine, where the last bits can come out differently; the scales are then
/// restored with that map and held plain, which loses nothing but some memory.
fn restore_scales(codes: &[u8], absmax: Vec<f32>, map: &[f32], offset: f32) -> Option<Absmax> {
    if map.len() != 256 || absmax.len() != codes.len().div_ceil(NESTED_BLOCK) {
        return None;
    }
    if map == nf4::dynamic_map() {
        return Some(Absmax::Nested {
            codes: codes.to_vec(),
            absmax,
            offset,
        });
    }
    let restore = |(block, &code): (usize, &u8)| {
        map[usize::from(code)] * absmax[block / NESTED_BLOCK] + offset
    };
    Some(Absmax::Plain(
        codes.iter().enumerate().map(restore).collect(),
    ))
}

fn product_name(layer: usize, module: Module) -> String {
    let (block, name) = module.path();
    format!("model.layers.{layer}.{block}.{name}.weight")
}

/// The shards of a folder, and which of them holds each tensor.
fn open_shards(folder: &Path) -> Result<(Vec<Shard>, BTreeMap<String, usize>)> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let path = folder.join(INDEX);
    if !path.exists() {
        let single = folder.join(SINGLE);
        if !single.exists() {
            let reason = match PICKLES.iter().find(|name| folder.join(name).exists()) {
                Some(pickle) => format!(
                    "holds {pickle} and no {SINGLE}: only safetensors are read; with transformers, \
                     `save_pretrained` writes the model as such"
                ),
                None => format!(
                    "holds neither {SINGLE} nor {INDEX}: not a model in Hugging Face layout"
                ),
            };
            return Err(Error::file(folder, reason));
        }
        let shard = Shard::open(single)?;
        let names = shard
            .header
            .tensors()
            .into_keys()
            .map(|name| (name, 0))
            .collect();
        return Ok((vec![shard], names));
    }
    let index: Index = serde_json::from_slice(&read(&path)?).map_err(|source| Error::Json {
        path: path.clone(),
        source,
    })?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names
        .iter()
        .find(|name| Path::new(name).components().count() != 1)
    {
        return Err(Error::key(
            &path,
            "weight_map",
            format!("names {name:?}, which is not a file of this folder"),
        ));
    }
    let shards: Vec<Shard> = names
        .iter()
        .map(|name| Shard::open(folder.join(name)))
        .collect::<Result<_>>()?;
    let mut tensors = BTreeMap::new();
    for (number, (shard, file)) in shards.iter().zip(&names).enumerate() {
        for name in shard.header.tensors().into_keys() {
            if index.weight_map.get(&name) != Some(*file) {
                return Err(Error::tensor(
                    &shard.path,
                    &name,
                    format!("is not where {INDEX} says"),
                ));
            }
            tensors.insert(name, number);
        }
    }
    match index
        .weight_map
        .iter()
        .find(|(name, _)| !tensors.contains_key(*name))
    {
        Some((name, file)) => Err(Error::tensor(
            &folder.join(file),
            name,
            format!("is missing, though {INDEX} says that it is here"),
        )),
        None => Ok((shards, tensors)),
    }
}

// Tensors need not be aligned in the file, so their values are copied out.

pub(crate) fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect()
}

pub(crate) fn bf16s(bytes: &[u8]) -> Vec<bf16> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| bf16::from_le_bytes(b))
        .collect()
}

pub(crate) fn f16s(bytes: &[u8]) -> Vec<f16> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| f16::from_le_bytes(b))
        .collect()
}
