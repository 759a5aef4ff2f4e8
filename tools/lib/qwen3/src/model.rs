//! Qwen3 (Yang et al., arXiv 2505.09388) with LoRA (Hu et al., arXiv
//! 2106.09685): one forward and one backward pass, written out.
//!
//! A layer is `x + O(attention(norm(x)))`, then `x + Down(silu(Gate) · Up)` of a
//! second norm; queries and keys are normed head by head before rotation. Base
//! weights are frozen: backward computes gradients of the adapters' factors and
//! of what lies between them, nothing else; below the lowest adapter it stops.

use engine::{
    Backend, Cache, Dropout, Group, Heads, HostMatrix, LinearGrad, Member, Neftune, QkNorms,
    Ragged, Reading, Result,
};

use crate::lora::{GROUPS, Ranks};
use crate::pass::{Buffers, GradActs, HeadActs, Keep, LayerActs, Pass};
use crate::{
    Adapter, Batch, Checkpoint, Config, Held, LayerWeights, Lora, LoraLayout, Module, OwnedLora,
};

impl Config {
    /// The attention's shape.
    pub(crate) fn attention(&self) -> Heads {
        Heads {
            query: self.heads,
            kv: self.kv_heads,
            dim: self.head_dim,
        }
    }
}

/// Places of the groups in [`GROUPS`].
const QKV: usize = 0;
const O: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;

/// A layer's frozen weights.
struct Layer<B: Backend> {
    norm1: B::F32,
    q_norm: B::F32,
    k_norm: B::F32,
    norm2: B::F32,
    /// By group.
    products: [Vec<B::Matrix>; 4],
}

/// A frozen base model on a device. Adapters are arguments of each call, so one
/// loaded base serves itself and any number of them.
pub struct Model<B: Backend> {
    backend: B,
    config: Config,
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    final_norm: B::F32,
    /// None: the embedding table again.
    head: Option<B::Matrix>,
    /// `[positions, head_dim]`: cosines, then sines.
    rope: B::F32,
}

/// What is random in one training step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepNoise {
    /// Share of the adapters' inputs that is dropped.
    pub dropout: f32,
    /// Strength of the noise on the embeddings ([`Backend::add_noise`]); 0: none.
    pub neftune_alpha: f32,
    /// The run's seed.
    pub seed: u64,
    /// Number of the optimiser step.
    pub step: u32,
}

/// Losses on their way back: negative log-likelihoods of the labelled tokens, in
/// the batch's order.
pub struct Losses<B: Backend> {
    reading: B::Reading,
}

impl<B: Backend> Losses<B> {
    /// Waits for them; in nats.
    ///
    /// # Errors
    /// If the device failed.
    pub fn wait(self) -> Result<Vec<f32>> {
        self.reading.wait()
    }
}

/// Keys and values of the tokens so far, by layer and slot.
pub(crate) struct KvCache<B: Backend> {
    pub shape: Cache,
    pub layers: Vec<(B::Act, B::Act)>,
}

/// Where the tokens of a pass stand and what they attend to.
pub(crate) struct Tokens<'a, B: Backend> {
    pub count: usize,
    pub positions: &'a B::Ids,
    /// Whole rows that attend to themselves; `None`: one token per slot that
    /// attends to the cache.
    pub rows: Option<&'a Ragged<B>>,
    /// The slot of each token's row, where keys and values are to be kept.
    pub slots: Option<&'a B::Ids>,
    /// The tokens whose last hidden state is wanted, and how many; `None`: all. For the
    /// others the last layer stops behind its attention.
    pub wanted: Option<(&'a B::Ids, usize)>,
}

/// What distinguishes the runs of a layer from each other.
struct Run<'a, B: Backend> {
    tokens: &'a Tokens<'a, B>,
    lora: Option<Lora<'a, B>>,
    /// Over all tokens, and over those that are wanted of the last layer.
    dropout: Option<[Dropout<'a, B>; 2]>,
}

/// Of which tokens a group is computed.
#[derive(Clone, Copy)]
struct Span {
    count: usize,
    /// Whether of the wanted ones, not of all.
    wanted: bool,
}

impl<'a, B: Backend> Run<'a, B> {
    /// All tokens.
    fn all(&self) -> Span {
        Span {
            count: self.tokens.count,
            wanted: false,
        }
    }

    fn dropout(&self, span: Span) -> Option<Dropout<'a, B>> {
        self.dropout
            .map(|dropout| dropout[usize::from(span.wanted)])
    }
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint layer by layer, its weights held as asked, quantised on the
    /// device if they are to be.
    ///
    /// # Errors
    /// If a file cannot be read or the device has no room.
    pub fn load(backend: B, checkpoint: &Checkpoint, held: impl Into<Held>) -> crate::Result<Self> {
        let (config, held) = (checkpoint.config().clone(), held.into());
        let layer = |b: &B, i| checkpoint.layer_by(i, held.products, |matrix| b.quantize(matrix));
        let ends = Ends {
            embedding: checkpoint.embedding()?,
            final_norm: checkpoint.final_norm()?,
            // Before the layers, so that they take the room that quantising it took.
            lm_head: checkpoint.lm_head_by(held.head, |matrix| backend.quantize(matrix))?,
        };
        Self::assemble(backend, config, ends, layer, upload)
    }

    /// Takes over weights, layer by layer.
    ///
    /// # Errors
    /// The first error of `layers`, or of the device, which may not have such heads.
    ///
    /// # Panics
    /// If `layers` ends early.
    pub fn new<E: From<engine::Error>>(
        backend: B,
        config: Config,
        ends: Ends,
        mut layers: impl Iterator<Item = Result<LayerWeights, E>>,
    ) -> Result<Self, E> {
        let next = |_: &B, _| layers.next().expect("weights for every layer");
        Self::assemble(backend, config, ends, next, upload)
    }

    /// Puts a model together; `place` brings a weight to the device, and is told of one
    /// that is looked up in, not multiplied by.
    pub(crate) fn assemble<M, E: From<engine::Error>>(
        backend: B,
        config: Config,
        ends: Ends<M>,
        mut layer: impl FnMut(&B, usize) -> Result<LayerWeights<M>, E>,
        place: impl Fn(&B, M, bool) -> Result<B::Matrix>,
    ) -> Result<Self, E> {
        backend.accepts(config.attention())?;
        let upload = |weights: LayerWeights<M>| -> Result<Layer<B>> {
            let mut products = weights.products.into_iter();
            let mut group = |members: &[_]| -> Result<Vec<_>> {
                let members = products.by_ref().take(members.len());
                members.map(|m| place(&backend, m, false)).collect()
            };
            Ok(Layer {
                norm1: backend.upload_f32(&weights.input_norm)?,
                q_norm: backend.upload_f32(&weights.q_norm)?,
                k_norm: backend.upload_f32(&weights.k_norm)?,
                norm2: backend.upload_f32(&weights.post_attention_norm)?,
                products: [
                    group(GROUPS[QKV])?,
                    group(GROUPS[O])?,
                    group(GROUPS[GATE_UP])?,
                    group(GROUPS[DOWN])?,
                ],
            })
        };
        let layers = (0..config.layers)
            .map(|i| Ok(upload(layer(&backend, i)?)?))
            .collect::<Result<_, E>>()?;
        Ok(Self {
            embedding: place(&backend, ends.embedding, ends.lm_head.is_some())?,
            final_norm: backend.upload_f32(&ends.final_norm)?,
            head: ends
                .lm_head
                .map(|head| place(&backend, head, false))
                .transpose()?,
            rope: backend.upload_f32(&rope_table(&config))?,
            layers,
            config,
            backend,
        })
    }

    /// Decodes the quantised products of its last `layers` layers once and for all, where
    /// the device gains by it: faster passes for memory, and the same bits. The last ones,
    /// for they are needed in both directions whatever is trained.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn keep_decoded(&mut self, layers: usize) -> Result<()> {
        for layer in self.layers.iter_mut().rev().take(layers) {
            for group in &mut layer.products {
                self.backend.keep_decoded(group)?;
            }
        }
        Ok(())
    }

    /// [Keeps decoded](Self::keep_decoded) what so many bytes hold; of how many layers. None
    /// where the device gains nothing by it.
    ///
    /// # Errors
    /// If the device has no room all the same.
    pub fn keep_decoded_within(&mut self, mut bytes: usize) -> Result<usize> {
        let taken = |layer: &Layer<B>| -> usize {
            let groups = layer.products.iter();
            groups.map(|group| self.backend.decoded_bytes(group)).sum()
        };
        let fitting = self.layers.iter().rev().take_while(|layer| {
            let left = bytes.checked_sub(taken(layer));
            bytes = left.unwrap_or(0);
            left.is_some() && taken(layer) > 0
        });
        let layers = fitting.count();
        self.keep_decoded(layers)?;
        Ok(layers)
    }

    /// Leaves its first layers only: for measuring what a layer takes.
    pub fn truncate(&mut self, layers: usize) {
        self.layers.truncate(layers);
        self.config.layers = self.layers.len();
    }

    /// The device it is on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The output projection `[vocabulary, hidden]`.
    pub(crate) fn head(&self) -> &B::Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Scratch bytes for `[tokens, predictions, longest]` and an adapter.
    pub(crate) fn scratch(&self, size: [usize; 3], ranks: Ranks) -> usize {
        let products = self.layers.iter().map(|layer| &layer.products);
        let heads = self.config.attention();
        scratch(&self.backend, heads, self.head(), products, size, ranks)
    }

    /// Puts an adapter on the device, to run the model with it.
    ///
    /// # Errors
    /// If it is of another model, or the device has no room.
    ///
    /// # Panics
    /// If its pairs are not those that its settings call for.
    pub fn load_adapter(&self, adapter: &Adapter) -> crate::Result<OwnedLora<B>> {
        let layout = LoraLayout::new(&self.config, &adapter.config)?;
        let params = self.adapter_params(&layout, &layout.flatten(&adapter.pairs))?;
        Ok(OwnedLora { layout, params })
    }

    /// Values to start training an adapter from: [`LoraLayout::init`]'s, and DoRA's
    /// magnitudes as the lengths of the base's rows, so that it changes nothing yet.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn initial(&self, layout: &LoraLayout, seed: u64) -> Result<Vec<f32>> {
        let mut values = layout.init(seed);
        if layout.dora() {
            let params = self.adapter_params(layout, &values)?;
            let read = self.backend.read_f32(&params, 0..layout.buffer_len());
            let with_norms = read.wait()?;
            for (layer, module, adapter) in layout.iter() {
                let rows = layout.magnitude(layer, module);
                if let (Some(rows), Some(dora)) = (rows, adapter.dora) {
                    let norms = &with_norms[dora.norm..][..rows.len()];
                    values[rows].copy_from_slice(norms);
                }
            }
        }
        Ok(values)
    }

    /// An adapter's values on the device, ready for [`Lora`]: what is trained, and
    /// behind it what DoRA computes from it.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If there are more or fewer values than the layout has.
    pub fn adapter_params(&self, layout: &LoraLayout, values: &[f32]) -> Result<B::F32> {
        assert_eq!(values.len(), layout.len(), "values of an adapter");
        if !layout.dora() {
            return self.backend.upload_f32(values);
        }
        let mut all = values.to_vec();
        all.resize(layout.buffer_len(), 0.0);
        let mut params = self.backend.upload_f32(&all)?;
        self.renew_norms(&mut Pass::new(Keep::Nothing), layout, &mut params)?;
        Ok(params)
    }

    /// Computes again what lies behind the trained values: to be called after every
    /// update of them. Nothing without DoRA. The pass lends its scratch memory.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn renew_norms(
        &self,
        pass: &mut Pass<B>,
        layout: &LoraLayout,
        params: &mut B::F32,
    ) -> Result<()> {
        if !layout.dora() {
            return Ok(());
        }
        let buffers = pass.fit(self, [0; 3], Some(Lora { layout, params }))?;
        for (layer, module, adapter) in layout.iter() {
            let weight = self.product(layer, module);
            let scratch = &mut buffers.scratch;
            self.backend.dora_norms(weight, &adapter, params, scratch);
        }
        Ok(())
    }

    /// A product's weight.
    fn product(&self, layer: usize, module: Module) -> &B::Matrix {
        let groups = GROUPS.iter().zip(&self.layers[layer].products);
        let mut all = groups.flat_map(|(modules, weights)| modules.iter().zip(weights));
        let found = all.find(|(of, _)| **of == module);
        found.expect("every module is in a group").1
    }

    /// Losses of a batch, without dropout and without gradients.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn losses(
        &self,
        pass: &mut Pass<B>,
        batch: &Batch<B>,
        lora: Option<Lora<'_, B>>,
    ) -> Result<Losses<B>> {
        let buffers = pass.fit(self, batch.size(), lora)?;
        if batch.labelled() == 0 {
            return Ok(self.read_losses(batch, buffers));
        }
        let tokens = Tokens {
            count: batch.tokens(),
            positions: &batch.rows.positions,
            rows: Some(&batch.rows),
            slots: None,
            wanted: Some((&batch.sources, batch.labelled())),
        };
        self.embed(&batch.ids, tokens.count, buffers);
        self.layers_forward(&tokens, lora, None, None, buffers);
        self.head_loss(batch, None, buffers);
        Ok(self.read_losses(batch, buffers))
    }

    /// Losses of a batch, and their gradients *added* to `grads`:
    /// `grads += scale · ∂ Σ nll / ∂ params`. With `scale` one over the labelled
    /// tokens of the whole optimiser step, the batches of a step add up to the
    /// gradient of its token mean, however it was cut into batches.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If the pass keeps nothing.
    pub fn losses_and_gradients(
        &self,
        pass: &mut Pass<B>,
        batch: &Batch<B>,
        lora: Lora<'_, B>,
        noise: Option<StepNoise>,
        (grads, scale): (&mut B::F32, f32),
    ) -> Result<Losses<B>> {
        assert_ne!(
            pass.keep(),
            Keep::Nothing,
            "a backward pass needs a pass that keeps"
        );
        let buffers = pass.fit(self, batch.size(), Some(lora))?;
        if batch.labelled() == 0 {
            return Ok(self.read_losses(batch, buffers));
        }
        let tokens = Tokens {
            count: batch.tokens(),
            positions: &batch.rows.positions,
            rows: Some(&batch.rows),
            slots: None,
            wanted: Some((&batch.sources, batch.labelled())),
        };
        let dropout = noise.filter(|n| n.dropout > 0.0).map(|n| {
            let of = |rows, positions| Dropout {
                p: n.dropout,
                seed: n.seed,
                step: n.step,
                rows,
                positions,
            };
            [
                of(&batch.rows.rows, &batch.rows.positions),
                of(&batch.source_rows, &batch.source_positions),
            ]
        });
        self.embed(&batch.ids, tokens.count, buffers);
        if let Some(noise) = noise.filter(|n| n.neftune_alpha > 0.0) {
            let neftune = Neftune {
                alpha: noise.neftune_alpha,
                seed: noise.seed,
                step: noise.step,
            };
            let (width, x) = (self.config.hidden_size, &mut buffers.stream[0]);
            self.backend.add_noise(&neftune, &batch.rows, width, x);
        }
        self.layers_forward(&tokens, Some(lora), dropout, None, buffers);
        self.head_loss(batch, Some(scale), buffers);

        let run = Run {
            tokens: &tokens,
            lora: Some(lora),
            dropout,
        };
        let Buffers {
            stream,
            layers,
            inside,
            head,
            grads: down,
            scratch,
            ..
        } = buffers;
        let down = down.as_mut().expect("a pass that keeps has gradients");
        // The layers that share the last buffer; the last of them is still in it.
        let (shared, last) = (layers.len() - 1, self.layers.len() - 1);
        for l in (lora.layout.lowest()..self.layers.len()).rev() {
            let (inputs, outputs) = stream.split_at_mut(l + 1);
            let x = &inputs[l];
            let acts = &mut layers[inside[l]];
            if inside[l] == shared && l < last {
                self.layer_forward(l, &run, None, x, acts, head, &mut outputs[0], scratch);
            }
            self.layer_backward(l, &run, &batch.rows, x, acts, head, down, grads, scratch);
        }
        Ok(self.read_losses(batch, buffers))
    }

    /// The first `batch.labelled()` losses, queued for reading.
    fn read_losses(&self, batch: &Batch<B>, buffers: &Buffers<B>) -> Losses<B> {
        Losses {
            reading: self
                .backend
                .read_f32(&buffers.head.nll, 0..batch.labelled()),
        }
    }

    /// Token embeddings into the start of the residual stream.
    pub(crate) fn embed(&self, ids: &B::Ids, tokens: usize, buffers: &mut Buffers<B>) {
        self.backend
            .embed(&self.embedding, ids, tokens, &mut buffers.stream[0]);
    }

    /// All layers, from the stream's start to its end.
    pub(crate) fn layers_forward(
        &self,
        tokens: &Tokens<'_, B>,
        lora: Option<Lora<'_, B>>,
        dropout: Option<[Dropout<'_, B>; 2]>,
        mut cache: Option<&mut KvCache<B>>,
        buffers: &mut Buffers<B>,
    ) {
        let run = Run {
            tokens,
            lora,
            dropout,
        };
        let streams = buffers.stream.len();
        for l in 0..self.layers.len() {
            let (from, to) = (l % streams, (l + 1) % streams);
            let (low, high) = buffers.stream.split_at_mut(from.max(to));
            let (x, out) = match from < to {
                true => (&low[from], &mut high[0]),
                false => (&high[0], &mut low[to]),
            };
            let acts = &mut buffers.layers[buffers.inside[l]];
            let cache = cache.as_deref_mut();
            let (head, scratch) = (&mut buffers.head, &mut buffers.scratch);
            self.layer_forward(l, &run, cache, x, acts, head, out, scratch);
        }
    }

    /// The stream's buffer behind the last layer.
    pub(crate) fn last_stream(&self, streams: usize) -> usize {
        self.layers.len() % streams
    }

    /// The wanted tokens, if a layer is the last one, and they are not all.
    fn wanted<'a>(&self, l: usize, run: &Run<'a, B>) -> Option<(&'a B::Ids, Span)> {
        let last = l + 1 == self.layers.len();
        let (index, count) = run.tokens.wanted.filter(|_| last)?;
        let span = Span {
            count,
            wanted: true,
        };
        Some((index, span))
    }

    /// One layer: `out` from `x`, what is inside into `acts`, and into `head` what the
    /// wanted tokens need of the last layer.
    #[expect(clippy::too_many_arguments, reason = "every buffer is named")]
    fn layer_forward(
        &self,
        l: usize,
        run: &Run<'_, B>,
        cache: Option<&mut KvCache<B>>,
        x: &B::Act,
        acts: &mut LayerActs<B>,
        head: &mut HeadActs<B>,
        out: &mut B::Act,
        scratch: &mut B::Workspace,
    ) {
        let (b, c, layer) = (&self.backend, &self.config, &self.layers[l]);
        let (heads, tokens) = (c.attention(), run.tokens.count);
        let params = run.lora.map(|l| l.params);
        let linear = |g: usize,
                      (x, span): (&B::Act, Span),
                      residual,
                      out: &mut B::Act,
                      xa: &mut B::Act,
                      scratch: &mut _| {
            let members = self.members(l, g, run.lora);
            let group = Group {
                layer: l as u32,
                members: &members,
            };
            b.linear(
                &group,
                params,
                run.dropout(span),
                (x, span.count),
                residual,
                out,
                xa,
                scratch,
            );
        };
        let LayerActs { xa, .. } = acts;
        let [xa_qkv, xa_o, xa_gate_up, xa_down] = xa;

        b.rms_norm(
            x,
            (&layer.norm1, c.rms_eps),
            [tokens, c.hidden_size],
            &mut acts.norm1,
            &mut acts.rstd1,
        );
        let input = (&acts.norm1, run.all());
        linear(QKV, input, None, &mut acts.qkv, xa_qkv, scratch);
        let norms = self.qk_norms(layer);
        let (qkv, qk, positions) = (&acts.qkv, &mut acts.qk, run.tokens.positions);
        b.qk_norm_rope(heads, &norms, positions, tokens, qkv, qk, &mut acts.rstd_qk);
        if let (Some(cache), Some(slots)) = (cache, run.tokens.slots) {
            let at = (slots, run.tokens.positions, tokens);
            let (keys, values) = &mut cache.layers[l];
            b.cache_append(heads, cache.shape, at, &acts.qk, &acts.qkv, (keys, values));
            if run.tokens.rows.is_none() {
                let (qk, store) = (&acts.qk, (&*keys, &*values));
                b.cache_attention(
                    heads,
                    cache.shape,
                    at,
                    qk,
                    store,
                    &mut acts.attended,
                    scratch,
                );
            }
        }
        if let Some(rows) = run.tokens.rows {
            let (out, lse) = (&mut acts.attended, &mut acts.lse);
            b.attention(heads, rows, &acts.qk, &acts.qkv, out, lse, scratch);
        }
        let (attended, x, span) = match self.wanted(l, run) {
            None => (&acts.attended, x, run.all()),
            Some((index, span)) => {
                let size = |width| [span.count, width];
                b.gather(&acts.attended, index, size(heads.q()), &mut head.attended);
                b.gather(x, index, size(c.hidden_size), &mut head.x);
                (&head.attended, &head.x, span)
            }
        };
        let of = |width| [span.count, width];
        let input = (attended, span);
        linear(O, input, Some(x), &mut acts.middle, xa_o, scratch);

        let (norm, size) = ((&layer.norm2, c.rms_eps), of(c.hidden_size));
        b.rms_norm(&acts.middle, norm, size, &mut acts.norm2, &mut acts.rstd2);
        let input = (&acts.norm2, span);
        linear(GATE_UP, input, None, &mut acts.gate_up, xa_gate_up, scratch);
        b.swiglu(&acts.gate_up, of(c.intermediate_size), &mut acts.inner);
        let input = (&acts.inner, span);
        linear(DOWN, input, Some(&acts.middle), out, xa_down, scratch);
    }

    /// One layer backwards: `down.stream` from the gradient of its output to that
    /// of its input, adapters' gradients added to `grads`. In the lowest layer that is
    /// trained it goes no further than the lowest adapter. The gradient of the last
    /// layer's output is in `head`, of the wanted tokens only.
    #[expect(clippy::too_many_arguments, reason = "every buffer is named")]
    fn layer_backward(
        &self,
        l: usize,
        run: &Run<'_, B>,
        rows: &Ragged<B>,
        x: &B::Act,
        acts: &LayerActs<B>,
        head: &mut HeadActs<B>,
        down: &mut GradActs<B>,
        grads: &mut B::F32,
        scratch: &mut B::Workspace,
    ) {
        let (b, c, layer) = (&self.backend, &self.config, &self.layers[l]);
        let (heads, tokens) = (c.attention(), run.tokens.count);
        let lora = run.lora.expect("training has an adapter");
        // Whether anything before group `g` of this layer is trained.
        let trained_below = |g: usize| lora.layout.trains_below(l, g);
        let mut linear = |g: usize,
                          (x, span): (&B::Act, Span),
                          dout: &B::Act,
                          dx: &mut B::Act,
                          scratch: &mut _| {
            let members = self.members(l, g, run.lora);
            let group = Group {
                layer: l as u32,
                members: &members,
            };
            let want = LinearGrad {
                dx: trained_below(g).then_some(dx),
                grads: Some(&mut *grads),
            };
            b.linear_backward(
                &group,
                Some(lora.params),
                run.dropout(span),
                (x, span.count),
                &acts.xa[g],
                dout,
                want,
                scratch,
            );
        };

        let wanted = self.wanted(l, run);
        let HeadActs {
            attended,
            grads: picked,
            ..
        } = head;
        let picked = picked.as_mut().expect("a pass that keeps has gradients");
        let (span, attended, dstream, dattended) = match wanted {
            None => {
                let (dstream, dattended) = (&mut down.stream, &mut down.attended);
                (run.all(), &acts.attended, dstream, dattended)
            }
            Some((_, span)) => (span, &*attended, &mut picked.stream, &mut picked.attended),
        };
        let of = |width| [span.count, width];
        let input = (&acts.inner, span);
        linear(DOWN, input, dstream, &mut down.inner, scratch);
        if !trained_below(DOWN) {
            return;
        }
        let size = of(c.intermediate_size);
        b.swiglu_backward(&acts.gate_up, &down.inner, size, &mut down.gate_up);
        let input = (&acts.norm2, span);
        linear(GATE_UP, input, &down.gate_up, &mut down.normed, scratch);
        if !trained_below(GATE_UP) {
            return;
        }
        let saved = (&acts.middle, &layer.norm2, &acts.rstd2);
        b.rms_norm_backward(&down.normed, saved, of(c.hidden_size), dstream);

        linear(O, (attended, span), dstream, dattended, scratch);
        if !trained_below(O) {
            return;
        }
        if let Some((index, Span { count, .. })) = wanted {
            let size = |width| [count, tokens, width];
            b.scatter(&picked.attended, index, size(heads.q()), &mut down.attended);
            b.scatter(&picked.stream, index, size(c.hidden_size), &mut down.stream);
        }
        b.attention_backward(
            heads,
            rows,
            (&acts.qk, &acts.qkv),
            (&acts.attended, &acts.lse),
            &down.attended,
            &mut down.qkv,
            scratch,
        );
        let (norms, saved) = (self.qk_norms(layer), (&acts.qkv, &acts.rstd_qk));
        b.qk_norm_rope_backward(
            heads,
            &norms,
            run.tokens.positions,
            tokens,
            saved,
            &mut down.qkv,
        );
        let input = (&acts.norm1, run.all());
        linear(QKV, input, &down.qkv, &mut down.normed, scratch);
        if !trained_below(QKV) {
            return;
        }
        let (saved, size) = ((x, &layer.norm1, &acts.rstd1), [tokens, c.hidden_size]);
        b.rms_norm_backward(&down.normed, saved, size, &mut down.stream);
    }

    /// The loss of the tokens that predict and, with a scale, its gradient by the
    /// residual stream behind the last layer.
    fn head_loss(&self, batch: &Batch<B>, scale: Option<f32>, buffers: &mut Buffers<B>) {
        let (b, c) = (&self.backend, &self.config);
        self.final_hidden(batch.labelled(), buffers);
        let size = [batch.labelled(), c.hidden_size];
        let last = &buffers.stream[self.last_stream(buffers.stream.len())];
        let (acts, scratch) = (&mut buffers.head, &mut buffers.scratch);
        let inputs = (&acts.normed, &batch.targets, size[0]);
        let Some((scale, grads)) = scale.zip(acts.grads.as_mut()) else {
            return b.head_loss(self.head(), inputs, &mut acts.nll, None, scratch);
        };
        let want = Some((&mut grads.normed, scale));
        b.head_loss(self.head(), inputs, &mut acts.nll, want, scratch);
        b.zero_act(&mut grads.stream, size[0] * size[1]);
        let saved = (last, &self.final_norm, &acts.rstd);
        b.rms_norm_backward(&grads.normed, saved, size, &mut grads.stream);
    }

    /// The final norm of the `count` wanted tokens, ready for the head.
    pub(crate) fn final_hidden(&self, count: usize, buffers: &mut Buffers<B>) {
        let size = [count, self.config.hidden_size];
        let last = &buffers.stream[self.last_stream(buffers.stream.len())];
        let norm = (&self.final_norm, self.config.rms_eps);
        let HeadActs { normed, rstd, .. } = &mut buffers.head;
        self.backend.rms_norm(last, norm, size, normed, rstd);
    }

    /// A group's weights with their adapters.
    fn members(&self, l: usize, g: usize, lora: Option<Lora<'_, B>>) -> Vec<Member<'_, B>> {
        let weights = self.layers[l].products[g].iter();
        let member = |(weight, &module)| Member {
            weight,
            adapter: lora.and_then(|lora| lora.layout.adapter(l, module)),
        };
        weights.zip(GROUPS[g]).map(member).collect()
    }

    /// The norms of a layer's queries and keys.
    fn qk_norms<'a>(&'a self, layer: &'a Layer<B>) -> QkNorms<'a, B> {
        QkNorms {
            q_norm: &layer.q_norm,
            k_norm: &layer.k_norm,
            rope: &self.rope,
            eps: self.config.rms_eps,
        }
    }
}

/// Scratch bytes of a pass of `[tokens, predictions, longest]` through layers with
/// these products, by group, and with an adapter.
pub(crate) fn scratch<'a, B: Backend>(
    backend: &B,
    heads: Heads,
    head: &B::Matrix,
    products: impl Iterator<Item = &'a [Vec<B::Matrix>; 4]>,
    [tokens, predictions, longest]: [usize; 3],
    ranks: Ranks,
) -> usize
where
    B::Matrix: 'a,
{
    let mut bytes = backend
        .attention_scratch(heads, longest)
        .max(backend.head_scratch(head, predictions));
    let groups = products.flat_map(|groups| groups.iter().zip(ranks.groups));
    for (weights, rank) in groups {
        let weights: Vec<_> = weights.iter().collect();
        bytes = bytes.max(backend.linear_scratch(&weights, [tokens, rank], ranks.dora));
        for weight in weights.into_iter().filter(|_| ranks.dora) {
            bytes = bytes.max(backend.dora_scratch(weight, rank));
        }
    }
    bytes
}

/// What is not in a layer.
pub struct Ends<M = HostMatrix> {
    /// Token embeddings `[vocabulary, hidden]`.
    pub embedding: M,
    /// Weight of the last norm `[hidden]`.
    pub final_norm: Vec<f32>,
    /// Output projection `[vocabulary, hidden]`; none: the embeddings again. A tied
    /// model may have one too: the same values, held otherwise.
    pub lm_head: Option<M>,
}

/// Brings a weight to the device.
fn upload<B: Backend>(backend: &B, weight: HostMatrix, looked_up: bool) -> Result<B::Matrix> {
    match looked_up {
        true => backend.upload_table(weight),
        false => backend.upload_matrix(weight),
    }
}

/// `[positions, head_dim]`: the cosines of `position · θ^(-2i/head_dim)`, then the
/// sines; the angle rounded to f32 where transformers rounds it.
fn rope_table(config: &Config) -> Vec<f32> {
    let half = config.head_dim / 2;
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / config.head_dim as f32;
        (1.0 / config.rope_theta.powf(f64::from(exponent))) as f32
    };
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let mut table = Vec::with_capacity(config.max_positions * config.head_dim);
    for position in 0..config.max_positions {
        let angles = || frequencies.iter().map(|f| f64::from(position as f32 * f));
        table.extend(angles().map(|a| a.cos() as f32));
        table.extend(angles().map(|a| a.sin() as f32));
    }
    table
}
