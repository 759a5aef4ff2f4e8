//! Replies, token by token.
//!
//! Prompts are read packed; then the next token of each reply is one row of one small
//! pass over the cache, which the device may fill up with rows of free slots. A finished
//! reply's slot goes to the next prompt. Draws
//! are keyed by the prompt's own number and the position, so which neighbours a
//! reply had does not enter its randomness.

use engine::{Backend, Cache, Ragged, Result, Sampling};

use crate::model::{KvCache, Model, Tokens};
use crate::pass::{Keep, Pass};
use crate::plan::Extent;
use crate::{Lora, LoraLayout};

/// A text to be continued.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Its number in the data: keys its random draws.
    pub number: u32,
    /// Its tokens; at least one.
    pub ids: &'a [u32],
}

/// How replies are generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation<'a> {
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Longest reply, in tokens.
    pub max_new_tokens: usize,
    /// Tokens that end a reply; they are not part of it.
    pub stop_ids: &'a [u32],
    /// Replies under way at the same time.
    pub slots: usize,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With a stop token.
    Stop,
    /// At the longest length, or at the model's last position.
    Length,
}

/// A generated reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Its tokens, without the stop token.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Prompt tokens read in one pass, unless a single prompt is longer.
const PREFILL_TOKENS: usize = 2048;

/// A reply under way.
struct Active {
    /// Index of its prompt.
    prompt: usize,
    slot: u32,
    ids: Vec<u32>,
}

/// Generates a reply to each prompt, in their order. `progress` hears how many
/// are finished. Memory comes and goes with the call; see [`Slots`].
///
/// # Errors
/// If the device has no room.
///
/// # Panics
/// If a prompt is empty or fills the model's positions, or there are no slots.
pub fn generate<B: Backend>(
    model: &Model<B>,
    lora: Option<Lora<'_, B>>,
    prompts: &[Prompt<'_>],
    how: &Generation<'_>,
    progress: impl FnMut(usize),
) -> Result<Vec<Completion>> {
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.ids.len()).collect();
    let mut slots = Slots::new(model, &lengths, how)?;
    let mut pass = Pass::new(Keep::Nothing);
    slots.generate((model, lora), &mut pass, prompts, how, progress)
}

/// The memory of replies under way: their keys and values, and their logits.
pub struct Slots<B: Backend> {
    cache: KvCache<B>,
    logits: B::F32,
    chosen: B::Ids,
    inputs: StepInputs<B>,
    /// The most prompt tokens of a pass.
    tokens: usize,
}

impl<B: Backend> Slots<B> {
    /// For prompts of these lengths, and any of no more and no longer ones.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(model: &Model<B>, lengths: &[usize], how: &Generation<'_>) -> Result<Self> {
        let (backend, config) = (model.backend(), model.config());
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let shape = Cache {
            slots: how.slots.min(lengths.len()),
            capacity: (config.max_positions).min(longest.saturating_add(how.max_new_tokens)),
        };
        let width = config.attention().k();
        let side = || backend.alloc_act(shape.slots * shape.capacity * width);
        let layer = |_| Ok((side()?, side()?));
        Ok(Self {
            cache: KvCache {
                shape,
                layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            },
            logits: backend.alloc_f32(shape.slots * config.vocab_size)?,
            chosen: backend.alloc_ids(shape.slots)?,
            inputs: StepInputs::new(backend, shape.slots)?,
            tokens: lengths
                .iter()
                .sum::<usize>()
                .min(longest.max(PREFILL_TOKENS)),
        })
    }

    /// Makes all the room at once that passes with an adapter of this layout will need.
    ///
    /// # Errors
    /// If the device has not got it.
    pub fn reserve(
        &self,
        model: &Model<B>,
        pass: &mut Pass<B>,
        layout: Option<&LoraLayout>,
    ) -> Result<()> {
        let Cache { slots, capacity } = self.cache.shape;
        let extent = Extent {
            rows: slots,
            tokens: self.tokens.max(slots),
            labelled: slots,
            longest: capacity,
        };
        pass.reserve(model, extent, layout)
    }

    /// As [`generate`], in this memory and that of `pass`.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If a prompt is empty, or does not leave room for its reply.
    pub fn generate(
        &mut self,
        (model, lora): (&Model<B>, Option<Lora<'_, B>>),
        pass: &mut Pass<B>,
        prompts: &[Prompt<'_>],
        how: &Generation<'_>,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Completion>> {
        let limit = model.config().max_positions;
        assert!(
            prompts.iter().all(|p| (1..limit).contains(&p.ids.len())),
            "prompts of 1 to {} tokens",
            limit - 1
        );
        let empty = Completion {
            ids: Vec::new(),
            finish: Finish::Length,
        };
        let mut replies = vec![empty; prompts.len()];
        if how.max_new_tokens == 0 || prompts.is_empty() {
            return Ok(replies);
        }
        let Cache { slots, capacity } = self.cache.shape;
        assert!(slots > 0, "generation needs a slot");
        assert!(
            (prompts.iter()).all(|p| limit.min(p.ids.len() + how.max_new_tokens) <= capacity),
            "a prompt that was not announced"
        );
        let Slots {
            cache,
            logits,
            chosen,
            inputs,
            ..
        } = self;
        let mut decoder = Decoder {
            model,
            lora,
            prompts,
            sampling: how.sampling,
            cache,
            logits,
            chosen,
            pass,
        };
        let mut free: Vec<u32> = (0..slots as u32).rev().collect();
        let mut waiting = (0..prompts.len()).peekable();
        let mut active: Vec<Active> = Vec::new();
        let mut done = 0;
        while done < prompts.len() {
            let mut fresh = Vec::new();
            let mut tokens = 0;
            while let (Some(&prompt), Some(&slot)) = (waiting.peek(), free.last()) {
                tokens += prompts[prompt].ids.len();
                if !fresh.is_empty() && tokens > PREFILL_TOKENS {
                    break;
                }
                waiting.next();
                free.pop();
                fresh.push(Active {
                    prompt,
                    slot,
                    ids: Vec::new(),
                });
            }
            let (moved, chosen) = if fresh.is_empty() {
                let chosen = decoder.step(&active, &free, inputs)?;
                (std::mem::take(&mut active), chosen)
            } else {
                let chosen = decoder.prefill(&fresh)?;
                (fresh, chosen)
            };
            for (mut reply, id) in moved.into_iter().zip(chosen) {
                let stop = how.stop_ids.contains(&id);
                if !stop {
                    reply.ids.push(id);
                }
                let length = prompts[reply.prompt].ids.len() + reply.ids.len();
                if stop || reply.ids.len() == how.max_new_tokens || length == limit {
                    free.push(reply.slot);
                    replies[reply.prompt] = Completion {
                        ids: reply.ids,
                        finish: if stop { Finish::Stop } else { Finish::Length },
                    };
                    done += 1;
                } else {
                    active.push(reply);
                }
            }
            progress(done);
        }
        Ok(replies)
    }
}

/// What a step is told of each of its rows: always in the same place, so that one step is
/// like another.
struct StepInputs<B: Backend> {
    ids: B::Ids,
    slots: B::Ids,
    positions: B::Ids,
    /// The number of the prompt, and the position of the next token.
    numbers: B::Ids,
    next: B::Ids,
}

impl<B: Backend> StepInputs<B> {
    fn new(backend: &B, rows: usize) -> Result<Self> {
        let ids = || backend.alloc_ids(rows);
        Ok(Self {
            ids: ids()?,
            slots: ids()?,
            positions: ids()?,
            numbers: ids()?,
            next: ids()?,
        })
    }

    /// Of these rows: token, slot, position, number.
    fn write(&mut self, backend: &B, rows: &[[u32; 4]]) -> Result<()> {
        let column = |of: fn(&[u32; 4]) -> u32| -> Vec<u32> { rows.iter().map(of).collect() };
        backend.write_ids(&column(|row| row[0]), &mut self.ids)?;
        backend.write_ids(&column(|row| row[1]), &mut self.slots)?;
        backend.write_ids(&column(|row| row[2]), &mut self.positions)?;
        backend.write_ids(&column(|row| row[3]), &mut self.numbers)?;
        backend.write_ids(&column(|row| row[2] + 1), &mut self.next)
    }
}

/// The device's side of one call.
struct Decoder<'a, B: Backend> {
    model: &'a Model<B>,
    lora: Option<Lora<'a, B>>,
    prompts: &'a [Prompt<'a>],
    sampling: Sampling,
    cache: &'a mut KvCache<B>,
    logits: &'a mut B::F32,
    chosen: &'a mut B::Ids,
    pass: &'a mut Pass<B>,
}

impl<B: Backend> Decoder<'_, B> {
    /// Reads the prompts of new replies and chooses their first tokens.
    fn prefill(&mut self, replies: &[Active]) -> Result<Vec<u32>> {
        let backend = self.model.backend();
        let (mut ids, mut slots, mut last) = (Vec::new(), Vec::new(), Vec::new());
        let mut lengths = Vec::new();
        for reply in replies {
            let prompt = &self.prompts[reply.prompt];
            ids.extend_from_slice(prompt.ids);
            slots.resize(ids.len(), reply.slot);
            last.push(ids.len() as u32 - 1);
            lengths.push((prompt.number, prompt.ids.len()));
        }
        let rows = Ragged::new(backend, &lengths)?;
        let (slots, last) = (backend.upload_ids(&slots)?, backend.upload_ids(&last)?);
        let numbers: Vec<u32> = lengths.iter().map(|&(number, _)| number).collect();
        let next: Vec<u32> = lengths.iter().map(|&(_, len)| len as u32).collect();
        let keys = (&backend.upload_ids(&numbers)?, &backend.upload_ids(&next)?);
        let count = ids.len();
        let ids = backend.upload_ids(&ids)?;
        let tokens = Tokens {
            count,
            positions: &rows.positions,
            rows: Some(&rows),
            slots: Some(&slots),
            wanted: Some((&last, replies.len())),
        };
        self.advance(replies.len(), &ids, &tokens, keys)?;
        backend.read_ids(self.chosen, replies.len())
    }

    /// Feeds every reply its last token and chooses the next. Where the device wants more
    /// rows, those are in slots that are free.
    fn step(
        &mut self,
        replies: &[Active],
        free: &[u32],
        inputs: &mut StepInputs<B>,
    ) -> Result<Vec<u32>> {
        let backend = self.model.backend();
        let last = |r: &Active| {
            let Prompt { number, ids } = self.prompts[r.prompt];
            let position = ids.len() + r.ids.len() - 1;
            [r.ids[r.ids.len() - 1], r.slot, position as u32, number]
        };
        let other = |&slot: &u32| [0, slot, 0, 0];
        let all = replies.iter().map(last).chain(free.iter().map(other));
        let rows: Vec<_> = all.take(backend.decoding_rows(replies.len())).collect();
        inputs.write(backend, &rows)?;
        let tokens = Tokens {
            count: rows.len(),
            positions: &inputs.positions,
            rows: None,
            slots: Some(&inputs.slots),
            wanted: None,
        };
        let keys = (&inputs.numbers, &inputs.next);
        backend.repeat(|| self.advance(rows.len(), &inputs.ids, &tokens, keys))?;
        backend.read_ids(self.chosen, replies.len())
    }

    /// One pass, and a token for each of `rows`, from the wanted tokens; `keys` are their
    /// prompts' numbers and the positions of what is chosen.
    fn advance(
        &mut self,
        rows: usize,
        ids: &B::Ids,
        tokens: &Tokens<'_, B>,
        keys: (&B::Ids, &B::Ids),
    ) -> Result<()> {
        let (model, backend) = (self.model, self.model.backend());
        let size = [tokens.count, rows, self.cache.shape.capacity];
        let buffers = self.pass.fit(model, size, self.lora)?;
        model.embed(ids, tokens.count, buffers);
        model.layers_forward(tokens, self.lora, None, Some(self.cache), buffers);
        model.final_hidden(rows, buffers);
        let (hidden, scratch) = (&buffers.head.normed, &mut buffers.scratch);
        backend.logits(model.head(), (hidden, rows), self.logits, scratch);
        let logits = (&*self.logits, [rows, model.config().vocab_size]);
        backend.sample(&self.sampling, logits, keys, self.chosen, scratch);
        Ok(())
    }
}
