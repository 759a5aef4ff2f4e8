//! Replies, token by token.
//!
//! Prompts are read packed; then the next token of each reply is one row of one small
//! pass over the cache, which the device may fill up with rows of free slots. A finished
//! reply's slot goes to the next prompt. Draws
//! are keyed by the prompt's own number and the position, so which neighbours a
//! reply had does not enter its randomness.
//!
//! A token that was chosen stays on the device for the next step. So where the device works
//! while the host goes on, a step is queued before the last one's tokens are known here; a
//! reply that turns out to have ended has had a row too many then, which nobody reads.

use std::collections::{BTreeMap, VecDeque};

use engine::{Backend, Cache, Ragged, Reading, Result, Sampling};

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
    slot: u32,
    /// Its tokens so far.
    ids: Vec<u32>,
    /// How many have been queued, those included.
    queued: usize,
}

impl Active {
    fn new(slot: u32) -> Self {
        Self {
            slot,
            ids: Vec::new(),
            queued: 0,
        }
    }
}

/// The next tokens of these prompts' replies, on their way back.
struct Expected<B: Backend> {
    prompts: Vec<usize>,
    tokens: B::IdsReading,
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
    /// The last token in each slot.
    last: B::Ids,
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
            last: backend.alloc_ids(shape.slots)?,
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
            (prompts.iter())
                .all(|p| limit.min(p.ids.len().saturating_add(how.max_new_tokens)) <= capacity),
            "a prompt that was not announced"
        );
        let Slots {
            cache,
            logits,
            chosen,
            last,
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
            last,
            pass,
        };
        // Tokens that a reply can have.
        let most = |prompt: usize| how.max_new_tokens.min(limit - prompts[prompt].ids.len());
        let ahead = if B::RUNS_AHEAD { 2 } else { 1 };
        let mut free: Vec<u32> = (0..slots as u32).rev().collect();
        let mut waiting = (0..prompts.len()).peekable();
        let mut active: BTreeMap<usize, Active> = BTreeMap::new();
        let mut expected: VecDeque<Expected<B>> = VecDeque::new();
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
                fresh.push((prompt, slot));
            }
            let asked: Vec<usize> = if fresh.is_empty() {
                let goes_on = |(&prompt, reply): (&usize, &Active)| {
                    let going = reply.queued < most(prompt);
                    going.then_some(prompt)
                };
                active.iter().filter_map(goes_on).collect()
            } else {
                active.extend(
                    fresh
                        .iter()
                        .map(|&(prompt, slot)| (prompt, Active::new(slot))),
                );
                fresh.iter().map(|&(prompt, _)| prompt).collect()
            };
            if !asked.is_empty() {
                let tokens = match fresh.is_empty() {
                    true => decoder.step(&active, &asked, &free, inputs)?,
                    false => decoder.prefill(&fresh)?,
                };
                for prompt in &asked {
                    active.get_mut(prompt).expect("it goes on").queued += 1;
                }
                expected.push_back(Expected {
                    prompts: asked,
                    tokens,
                });
                if expected.len() < ahead {
                    continue;
                }
            }
            let oldest = expected.pop_front().expect("a reply is under way");
            for (prompt, id) in oldest.prompts.into_iter().zip(oldest.tokens.wait()?) {
                let Some(reply) = active.get_mut(&prompt) else {
                    continue; // it had ended by then
                };
                let stop = how.stop_ids.contains(&id);
                if !stop {
                    reply.ids.push(id);
                }
                if stop || reply.ids.len() == most(prompt) {
                    let reply = active.remove(&prompt).expect("it was there");
                    free.push(reply.slot);
                    replies[prompt] = Completion {
                        ids: reply.ids,
                        finish: if stop { Finish::Stop } else { Finish::Length },
                    };
                    done += 1;
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

    /// Of these rows: slot, position, number.
    fn write(&mut self, backend: &B, rows: &[[u32; 3]]) -> Result<()> {
        let column = |of: fn(&[u32; 3]) -> u32| -> Vec<u32> { rows.iter().map(of).collect() };
        backend.write_ids(&column(|row| row[0]), &mut self.slots)?;
        backend.write_ids(&column(|row| row[1]), &mut self.positions)?;
        backend.write_ids(&column(|row| row[2]), &mut self.numbers)?;
        backend.write_ids(&column(|row| row[1] + 1), &mut self.next)
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
    last: &'a mut B::Ids,
    pass: &'a mut Pass<B>,
}

impl<B: Backend> Decoder<'_, B> {
    /// Reads these prompts into their slots and chooses the first tokens of their replies.
    fn prefill(&mut self, fresh: &[(usize, u32)]) -> Result<B::IdsReading> {
        let backend = self.model.backend();
        let (mut ids, mut slots, mut last) = (Vec::new(), Vec::new(), Vec::new());
        let mut lengths = Vec::new();
        for &(prompt, slot) in fresh {
            let prompt = &self.prompts[prompt];
            ids.extend_from_slice(prompt.ids);
            slots.resize(ids.len(), slot);
            last.push(ids.len() as u32 - 1);
            lengths.push((prompt.number, prompt.ids.len()));
        }
        let rows = Ragged::new(backend, &lengths)?;
        let own: Vec<u32> = fresh.iter().map(|&(_, slot)| slot).collect();
        let own = backend.upload_ids(&own)?;
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
            wanted: Some((&last, fresh.len())),
        };
        self.advance(fresh.len(), &ids, &tokens, (&own, keys))?;
        Ok(backend.read_ids(self.chosen, fresh.len()))
    }

    /// Feeds the replies to these prompts, in order, their last tokens and chooses the next.
    /// Where the device wants more rows, those are in slots that are free, or whose replies
    /// have all their tokens queued.
    fn step(
        &mut self,
        active: &BTreeMap<usize, Active>,
        asked: &[usize],
        free: &[u32],
        inputs: &mut StepInputs<B>,
    ) -> Result<B::IdsReading> {
        let backend = self.model.backend();
        let last = |prompt: &usize| {
            let Prompt { number, ids } = self.prompts[*prompt];
            let position = ids.len() + active[prompt].queued - 1;
            [active[prompt].slot, position as u32, number]
        };
        let full = |(prompt, reply): (&usize, &Active)| {
            let asked = asked.binary_search(prompt).is_ok();
            (!asked).then_some(reply.slot)
        };
        let spare = active.iter().filter_map(full).chain(free.iter().copied());
        let all = (asked.iter().map(last)).chain(spare.map(|slot| [slot, 0, 0]));
        let rows: Vec<_> = all.take(backend.decoding_rows(asked.len())).collect();
        inputs.write(backend, &rows)?;
        let tokens = Tokens {
            count: rows.len(),
            positions: &inputs.positions,
            rows: None,
            slots: Some(&inputs.slots),
            wanted: None,
        };
        let of = (&inputs.slots, (&inputs.numbers, &inputs.next));
        backend.repeat(|| {
            backend.gather_ids(self.last, &inputs.slots, rows.len(), &mut inputs.ids);
            self.advance(rows.len(), &inputs.ids, &tokens, of)
        })?;
        Ok(backend.read_ids(self.chosen, asked.len()))
    }

    /// One pass, and a token for each of `rows`, from the wanted tokens, which is noted in
    /// their `slots`; `keys` are their prompts' numbers and the positions of what is chosen.
    fn advance(
        &mut self,
        rows: usize,
        ids: &B::Ids,
        tokens: &Tokens<'_, B>,
        (slots, keys): (&B::Ids, (&B::Ids, &B::Ids)),
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
        backend.scatter_ids(self.chosen, slots, rows, self.last);
        Ok(())
    }
}
