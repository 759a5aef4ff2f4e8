//! Qwen3 with LoRA in plain differentiable tensor operations.
//!
//! Written to be read against the published architecture, not to be fast: RMSNorm
//! before attention and MLP, RMSNorm on each head of q and k before a half-split
//! RoPE, grouped-query attention, SwiGLU, no biases. candle's fused forms
//! (`rms_norm`, `rope`, `softmax_last_dim`) drop gradients without an error, so
//! each is spelled out here. Everything runs in the dtype of the weights: f32 to
//! compare with other software, f64 to judge rounding by.
//!
//! Names are Hugging Face's for weights (`model.layers.0.self_attn.q_proj.weight`)
//! and PEFT's for adapters (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{D, DType, Device, Tensor, Var, backprop::GradStore};
use serde::{Deserialize, Serialize};

use crate::random::Random;

/// The shape of a model: the keys of `config.json` that matter here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even; times the heads it need not be `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether lm_head is the embedding table.
    pub tie_word_embeddings: bool,
}

/// The seven projections of a layer that LoRA may adapt.
pub const TARGETS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl Config {
    /// Reads `config.json` from a model folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// `(out, in)` of a projection in [`TARGETS`].
    ///
    /// # Panics
    /// On a name that is not one of them.
    pub fn projection(&self, target: &str) -> (usize, usize) {
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        match target {
            "self_attn.q_proj" => (q, self.hidden_size),
            "self_attn.k_proj" | "self_attn.v_proj" => (kv, self.hidden_size),
            "self_attn.o_proj" => (self.hidden_size, q),
            "mlp.gate_proj" | "mlp.up_proj" => (self.intermediate_size, self.hidden_size),
            "mlp.down_proj" => (self.hidden_size, self.intermediate_size),
            _ => panic!("{target} is not a projection of Qwen3"),
        }
    }

    /// Every weight's name and shape, in a fixed order.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let table = vec![self.vocab_size, self.hidden_size];
        let mut all = vec![("model.embed_tokens.weight".to_owned(), table.clone())];
        for layer in 0..self.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                all.push((name(norm), vec![self.hidden_size]));
            }
            for norm in ["self_attn.q_norm", "self_attn.k_norm"] {
                all.push((name(norm), vec![self.head_dim]));
            }
            for target in TARGETS {
                let (rows, columns) = self.projection(target);
                all.push((name(target), vec![rows, columns]));
            }
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), table));
        }
        all
    }
}

/// Rows laid end to end, as a packed batch is.
///
/// Attention is causal within a segment and blind outside it; positions restart
/// with each segment.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids of all segments. `[tokens]`
    pub ids: Vec<u32>,
    /// What the logits of each position must predict (the *next* token, so
    /// already shifted), or `None` where nothing is asked. `[tokens]`
    pub targets: Vec<Option<u32>>,
    /// Lengths of the segments; they sum to the number of tokens.
    pub segments: Vec<usize>,
    /// Attention is computed in windows of this many tokens, which no segment
    /// may straddle and which must divide the batch; 0 is one window of all.
    /// Only speed depends on it.
    pub window: usize,
}

impl Batch {
    /// Appends one row. `labelled[i]` says whether token `i` itself is to be
    /// predicted, as Hugging Face's labels do; the first token never is.
    ///
    /// # Panics
    /// If the two lengths differ.
    pub fn push(&mut self, ids: &[u32], labelled: &[bool]) {
        assert_eq!(ids.len(), labelled.len(), "one label flag per token");
        self.ids.extend_from_slice(ids);
        self.segments.push(ids.len());
        let next = ids.iter().zip(labelled).skip(1);
        self.targets.extend(next.map(|(&id, &on)| on.then_some(id)));
        self.targets.resize(self.ids.len(), None);
    }

    /// How many positions carry a loss.
    pub fn labelled(&self) -> usize {
        self.targets.iter().flatten().count()
    }

    fn positions(&self) -> impl Iterator<Item = usize> {
        self.segments.iter().flat_map(|&n| 0..n)
    }
}

/// Low-rank updates of some projections: `W x + scale · B (A x)`.
#[derive(Clone, Debug)]
pub struct Lora {
    /// `…lora_A.weight` `[r, in]` and `…lora_B.weight` `[out, r]` by PEFT name.
    pub tensors: BTreeMap<String, Tensor>,
    /// `alpha / r`, or `alpha / √r` with rank-stabilised LoRA.
    pub scale: f64,
    /// Dropout masks already divided by the keep probability, multiplied into
    /// the input of A. `[tokens, in]` by module, as `model.layers.0.mlp.up_proj`;
    /// a module without one has no dropout.
    pub masks: BTreeMap<String, Tensor>,
}

impl Lora {
    /// A and B both uniform in ±1/√in and ±`b`, for the given targets of every
    /// layer. A fresh adapter has `b = 0`; a test wants gradients that reach A.
    pub fn random(
        config: &Config,
        targets: &[&str],
        rank: usize,
        scale: f64,
        b: f64,
        dtype: DType,
        seed: u64,
    ) -> Result<Self> {
        let mut random = Random::new(seed);
        let mut tensors = BTreeMap::new();
        for layer in 0..config.num_hidden_layers {
            for target in targets {
                let (rows, columns) = config.projection(target);
                let module = format!("model.layers.{layer}.{target}");
                let bound = 1.0 / (columns as f64).sqrt();
                let a = random.uniform(&[rank, columns], bound, dtype)?;
                tensors.insert(Self::name(&module, "A"), a);
                let b = random.uniform(&[rows, rank], b, dtype)?;
                tensors.insert(Self::name(&module, "B"), b);
            }
        }
        Ok(Self {
            tensors,
            scale,
            masks: BTreeMap::new(),
        })
    }

    /// PEFT's name for factor `A` or `B` of a module such as
    /// `model.layers.0.self_attn.q_proj`.
    pub fn name(module: &str, factor: &str) -> String {
        format!("base_model.model.{module}.lora_{factor}.weight")
    }

    /// `scale · B (A (mask ⊙ x))`, or nothing where the module is not adapted.
    fn update(&self, module: &str, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(a) = self.tensors.get(&Self::name(module, "A")) else {
            return Ok(None);
        };
        let b = self
            .tensors
            .get(&Self::name(module, "B"))
            .with_context(|| format!("{module} has lora_A but no lora_B"))?;
        let x = match self.masks.get(module) {
            Some(mask) => x.mul(mask)?,
            None => x.clone(),
        };
        let update = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
        Ok(Some((update * self.scale)?))
    }
}

/// A loss and the gradient of it for each named tensor.
pub type Gradients = (f64, BTreeMap<String, Tensor>);

/// The weights and the forward pass over them.
#[derive(Clone, Debug)]
pub struct Model {
    /// The shape.
    pub config: Config,
    /// Every tensor of [`Config::weights`] by name, all of one dtype.
    pub weights: BTreeMap<String, Tensor>,
}

impl Model {
    /// Takes the weights after checking that each is there with its shape.
    pub fn new(config: Config, weights: HashMap<String, Tensor>) -> Result<Self> {
        ensure!(
            config
                .num_attention_heads
                .is_multiple_of(config.num_key_value_heads),
            "{} query heads cannot share {} key heads evenly",
            config.num_attention_heads,
            config.num_key_value_heads
        );
        let mut weights: BTreeMap<_, _> = weights.into_iter().collect();
        let wanted = config.weights();
        for (name, shape) in &wanted {
            let tensor = weights
                .get(name)
                .with_context(|| format!("{name} is missing"))?;
            ensure!(
                tensor.dims() == shape,
                "{name} is {:?}, expected {shape:?}",
                tensor.dims()
            );
        }
        // A tied checkpoint may still carry a copy of the table.
        if config.tie_word_embeddings {
            weights.remove("lm_head.weight");
        }
        if let Some(name) = weights
            .keys()
            .find(|name| !wanted.iter().any(|(want, _)| want == *name))
        {
            bail!("{name} is no weight of this model");
        }
        Ok(Self { config, weights })
    }

    /// Fresh weights: normal with the given deviation, output projections of the
    /// residual stream smaller by √(2·layers), norm weights 1.
    pub fn random(config: Config, deviation: f64, dtype: DType, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let residual = deviation / (2.0 * config.num_hidden_layers as f64).sqrt();
        let weights = config
            .weights()
            .into_iter()
            .map(|(name, shape)| {
                let tensor = if shape.len() == 1 {
                    Tensor::ones(shape, dtype, &Device::Cpu)?
                } else if name.contains("o_proj") || name.contains("down_proj") {
                    random.normal(&shape, residual, dtype)?
                } else {
                    random.normal(&shape, deviation, dtype)?
                };
                Ok((name, tensor))
            })
            .collect::<Result<_>>()?;
        Self::new(config, weights)
    }

    /// Reads `config.json` and `model.safetensors`, cast to `dtype`.
    pub fn load(dir: &Path, dtype: DType) -> Result<Self> {
        let config = Config::read(dir)?;
        let path = dir.join("model.safetensors");
        let weights = candle_core::safetensors::load(&path, &Device::Cpu)
            .with_context(|| path.display().to_string())?
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)))
            .collect::<Result<_>>()?;
        Self::new(config, weights).with_context(|| path.display().to_string())
    }

    /// Next-token logits at every position. `[tokens, vocab]`
    pub fn logits(&self, batch: &Batch, lora: Option<&Lora>) -> Result<Tensor> {
        let hidden = self.hidden(batch, lora)?;
        Ok(hidden.matmul(&self.head()?.t()?)?)
    }

    /// Negative log-likelihood of each target, in order of position. `[labelled]`
    pub fn nll(&self, batch: &Batch, lora: Option<&Lora>) -> Result<Tensor> {
        let (rows, targets): (Vec<u32>, Vec<u32>) = (0u32..)
            .zip(&batch.targets)
            .filter_map(|(row, target)| target.map(|id| (row, id)))
            .unzip();
        ensure!(!rows.is_empty(), "no position of the batch has a target");
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, &Device::Cpu)?;
        let targets = Tensor::from_vec(targets, (count, 1), &Device::Cpu)?;
        let hidden = self.hidden(batch, lora)?.index_select(&rows, 0)?;
        let logits = hidden.matmul(&self.head()?.t()?)?;
        // logsumexp(z) - z[target], shifted by the (constant) maximum.
        let shift = logits.max_keepdim(D::Minus1)?.detach();
        let logits = logits.broadcast_sub(&shift)?;
        let total = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let chosen = logits.gather(&targets, 1)?;
        Ok((total - chosen)?.squeeze(1)?)
    }

    /// Mean of [`Self::nll`] over the batch. Scalar.
    pub fn loss(&self, batch: &Batch, lora: Option<&Lora>) -> Result<Tensor> {
        Ok(self.nll(batch, lora)?.mean_all()?)
    }

    /// The loss and its gradient for every weight.
    pub fn weight_gradients(&self, batch: &Batch, lora: Option<&Lora>) -> Result<Gradients> {
        let model = Self {
            config: self.config.clone(),
            weights: trainable(&self.weights)?,
        };
        let loss = model.loss(batch, lora)?;
        collect(&loss, &loss.backward()?, &model.weights)
    }

    /// The loss and its gradient for every tensor of the adapter.
    pub fn lora_gradients(&self, batch: &Batch, lora: &Lora) -> Result<Gradients> {
        let lora = Lora {
            tensors: trainable(&lora.tensors)?,
            ..lora.clone()
        };
        let loss = self.loss(batch, Some(&lora))?;
        collect(&loss, &loss.backward()?, &lora.tensors)
    }

    fn weight(&self, module: &str) -> Result<&Tensor> {
        self.weights
            .get(&format!("{module}.weight"))
            .with_context(|| format!("{module}.weight is missing"))
    }

    fn head(&self) -> Result<&Tensor> {
        self.weight(if self.config.tie_word_embeddings {
            "model.embed_tokens"
        } else {
            "lm_head"
        })
    }

    /// The stream after the last norm. `[tokens, hidden]`
    fn hidden(&self, batch: &Batch, lora: Option<&Lora>) -> Result<Tensor> {
        let layout = Layout::new(&self.config, batch, self.head()?.dtype())?;
        let ids = Tensor::from_slice(&batch.ids, batch.ids.len(), &Device::Cpu)?;
        let mut x = self.weight("model.embed_tokens")?.index_select(&ids, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            let pass = Layer {
                model: self,
                lora,
                layout: &layout,
                prefix: format!("model.layers.{layer}"),
            };
            x = (&x + pass.attention(&pass.norm("input_layernorm", &x)?)?)?;
            x = (&x + pass.mlp(&pass.norm("post_attention_layernorm", &x)?)?)?;
        }
        rms_norm(&x, self.weight("model.norm")?, self.config.rms_norm_eps)
    }
}

/// One layer's pass over one batch.
struct Layer<'a> {
    model: &'a Model,
    lora: Option<&'a Lora>,
    layout: &'a Layout,
    prefix: String,
}

impl Layer<'_> {
    fn norm(&self, part: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.model.weight(&format!("{}.{part}", self.prefix))?;
        rms_norm(x, weight, self.model.config.rms_norm_eps)
    }

    fn project(&self, target: &str, x: &Tensor) -> Result<Tensor> {
        let module = format!("{}.{target}", self.prefix);
        let y = x.matmul(&self.model.weight(&module)?.t()?)?;
        match self.lora.map(|lora| lora.update(&module, x)).transpose()? {
            Some(Some(update)) => Ok((y + update)?),
            _ => Ok(y),
        }
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let config = &self.model.config;
        let (heads, groups, dim) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        );
        let Layout {
            windows, length, ..
        } = *self.layout;
        // Query head h reads key head h / (heads / groups): the queries of one
        // key head are neighbours, so they fold into one product with it.
        let folded = (windows, groups, heads / groups * length, dim);

        let q = self.project("self_attn.q_proj", x)?;
        let q = q.reshape((windows * length, heads, dim))?;
        let q = self.layout.rotate(&self.norm("self_attn.q_norm", &q)?)?;
        let q = self.layout.by_head(&q, heads)?.reshape(folded)?;

        let k = self.project("self_attn.k_proj", x)?;
        let k = k.reshape((windows * length, groups, dim))?;
        let k = self.layout.rotate(&self.norm("self_attn.k_norm", &k)?)?;
        let k = self.layout.by_head(&k, groups)?;

        let v = self.project("self_attn.v_proj", x)?;
        let v = self.layout.by_head(&v, groups)?;

        // [windows, groups, queries, length]
        let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (dim as f64).sqrt())?;
        let scores = scores.reshape((windows, heads, length, length))?;
        let scores = scores.broadcast_add(&self.layout.mask)?;
        let shift = scores.max_keepdim(D::Minus1)?.detach();
        let weights = scores.broadcast_sub(&shift)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let weights = weights.reshape((windows, groups, heads / groups * length, length))?;

        let mixed = weights.matmul(&v)?.reshape((windows, heads, length, dim))?;
        let mixed = mixed.transpose(1, 2)?.contiguous()?;
        self.project(
            "self_attn.o_proj",
            &mixed.reshape((windows * length, heads * dim))?,
        )
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.project("mlp.gate_proj", x)?.silu()?;
        let up = self.project("mlp.up_proj", x)?;
        self.project("mlp.down_proj", &(gate * up)?)
    }
}

/// `x / √(mean(x²) + eps) · weight` over the last dimension.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(x.broadcast_div(&root)?.broadcast_mul(weight)?)
}

/// What attention needs to know about a batch's segments.
struct Layout {
    windows: usize,
    length: usize,
    /// 0 where a query may look, -∞ elsewhere. `[windows, 1, length, length]`
    mask: Tensor,
    /// Rotary tables. `[tokens, 1, head_dim / 2]`
    cos: Tensor,
    sin: Tensor,
}

impl Layout {
    fn new(config: &Config, batch: &Batch, dtype: DType) -> Result<Self> {
        let tokens = batch.ids.len();
        ensure!(
            tokens > 0 && batch.targets.len() == tokens,
            "a batch needs tokens, and a target (or none) for each"
        );
        ensure!(
            batch.segments.iter().sum::<usize>() == tokens,
            "the segments do not sum to {tokens} tokens"
        );
        let length = if batch.window == 0 {
            tokens
        } else {
            batch.window
        };
        ensure!(
            tokens.is_multiple_of(length),
            "windows of {length} do not divide {tokens} tokens"
        );

        let mut mask = vec![f32::NEG_INFINITY; tokens * length];
        let mut start = 0;
        for &segment in &batch.segments {
            let offset = start % length;
            ensure!(offset + segment <= length, "a segment straddles windows");
            for query in 0..segment {
                let row = (start + query) * length + offset;
                mask[row..=row + query].fill(0.0);
            }
            start += segment;
        }
        let windows = tokens / length;
        let mask = Tensor::from_vec(mask, (windows, 1, length, length), &Device::Cpu)?;

        let half = config.head_dim / 2;
        let angles: Vec<f64> = batch
            .positions()
            .flat_map(|position| {
                (0..half).map(move |i| {
                    let exponent = -2.0 * i as f64 / config.head_dim as f64;
                    position as f64 * config.rope_theta.powf(exponent)
                })
            })
            .collect();
        let angles = Tensor::from_vec(angles, (tokens, 1, half), &Device::Cpu)?;
        Ok(Self {
            windows,
            length,
            mask: mask.to_dtype(dtype)?,
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
        })
    }

    /// Half-split RoPE: dimension i turns with i + dim/2. `[tokens, heads, dim]`
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let (cos, sin) = (&self.cos, &self.sin);
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        Ok(Tensor::cat(&[first, second], 2)?)
    }

    /// `[tokens, heads · dim]` to `[windows, heads, length, dim]`.
    fn by_head(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let dim = x.elem_count() / (self.windows * self.length * heads);
        Ok(x.reshape((self.windows, self.length, heads, dim))?
            .transpose(1, 2)?
            .contiguous()?)
    }
}

/// Copies that candle records gradients for.
fn trainable(tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    tensors
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(tensor)?.into_inner())))
        .collect()
}

/// Looks up each tensor's gradient; one that candle lost is an error, not a zero.
fn collect(
    loss: &Tensor,
    store: &GradStore,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<Gradients> {
    let gradients = tensors
        .iter()
        .map(|(name, tensor)| {
            let gradient = store
                .get(tensor)
                .with_context(|| format!("no gradient reached {name}"))?;
            Ok((name.clone(), gradient.clone()))
        })
        .collect::<Result<_>>()?;
    Ok((loss.to_dtype(DType::F64)?.to_scalar()?, gradients))
}
