//! Every system's answer to every pair, and what they add up to.

use anyhow::{Context, Result};
use cli::{App, Failure, Progress};
use engine::{Backend, Sampling};
use jsonl::Output;
use qwen3::{Chat, Finish, Model, plan};
use settings::Generation;

use crate::items::Item;
use crate::journal::Journal;
use crate::lines::{ItemLine, Ordered, SystemLine, SystemScores};
use crate::scores::Corpus;
use crate::setup::Setup;
use crate::systems::{self, Answer, Decoding, Room, System};

/// What adds up over the items of one system.
struct Tally {
    corpus: Corpus,
    nll: f64,
    tokens: u64,
    cut: u64,
}

impl Tally {
    fn new() -> Self {
        Self {
            corpus: Corpus::new(),
            nll: 0.0,
            tokens: 0,
            cut: 0,
        }
    }

    fn add(&mut self, item: &Item, answer: &Answer, chat: &Chat) -> Result<SystemLine> {
        // A model may begin or end with a line break; no reader would see it.
        let prediction = chat.decode(&answer.completion.ids)?.trim().to_owned();
        let scores = self.corpus.add(&item.scored(&prediction), &item.reference);
        let tokens = item.plain.reference_tokens();
        self.nll += answer.nll;
        self.tokens += tokens as u64;
        let finish = match answer.completion.finish {
            Finish::Stop => "stop",
            Finish::Length => {
                self.cut += 1;
                "length"
            }
        };
        Ok(SystemLine {
            prediction,
            scores,
            nll: answer.nll / tokens as f64,
            finish,
        })
    }

    fn scores(&self) -> SystemScores {
        let nll = self.nll / self.tokens as f64;
        SystemScores {
            scores: self.corpus.scores(),
            nll,
            nll_tokens: self.tokens,
            perplexity: nll.exp(),
            cut: self.cut,
        }
    }
}

/// Answers under way: how far they are, and whether someone wants them to end. A signal
/// waits for the block in hand where there is a journal to keep it; where there is none,
/// nothing would be gained by waiting.
struct UnderWay<'a> {
    app: &'a App,
    progress: Progress<'a>,
    total: u64,
    kept: bool,
}

impl<'a> UnderWay<'a> {
    fn new(app: &'a App, total: u64, kept: bool) -> Result<Self> {
        if kept {
            // The first call takes the signals over.
            app.interrupted()?;
        }
        Ok(Self {
            progress: app.progress("replies", Some(total)),
            app,
            total,
            kept,
        })
    }

    fn interrupted(&self) -> bool {
        self.kept && self.app.interrupted().unwrap_or(false)
    }

    /// So many replies are there, those of the block in hand included.
    fn at(&self, replies: u64, system: &str) {
        self.progress.set_with(replies, system);
    }

    /// After a block, of which so many replies in all are kept.
    ///
    /// # Errors
    /// If it is to end here.
    fn heed_requests(&self, replies: u64, journal: &Journal) -> Result<()> {
        let kept = || {
            let (total, path) = (self.total, journal.path().display());
            format!("{replies} of {total} replies are kept in {path}")
        };
        if self.app.asked_to_save()? {
            self.app.info(kept());
        }
        match self.interrupted() && replies < self.total {
            true => {
                let cause = format!("interrupted; {}, the same command goes on", kept());
                Err(Failure::Interrupted(cause).into())
            }
            false => Ok(()),
        }
    }
}

/// What is left of a GPU's memory makes it faster: quantised weights lie there decoded.
fn decode_into_the_rest<B: Backend>(app: &App, model: &mut Model<B>) -> Result<()> {
    let free = model.backend().free_memory()?.unwrap_or(0);
    match model.keep_decoded_within(plan::usable(free)) {
        Ok(0) => {}
        Ok(layers) => app.detail(format_args!(
            "the weights of {layers} of {} layers lie decoded as well, for speed",
            model.config().layers
        )),
        Err(error @ engine::Error::OutOfMemory { .. }) => {
            app.detail(format_args!("weights are decoded each time: {error}"));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Answers all items block by block and writes each block as it is done; the figures
/// of each system over all of them. Answers that `journal` has are taken from it, and
/// new ones put there.
pub fn write_items<'a, B: Backend>(
    app: &App,
    settings: &Generation,
    setup: &'a Setup,
    mut model: Model<B>,
    items: &[Item],
    mut journal: Option<&mut Journal>,
    out: &mut Output,
) -> Result<Vec<(&'a str, SystemScores)>> {
    let base = setup.checkpoint.folder();
    let mut systems = vec![System::base(base)];
    for (name, adapter) in &setup.adapters {
        systems.push(System::adapted(name, adapter, &model, base)?);
    }
    let named = setup.adapters.iter().map(|(name, _)| name.as_str());
    let mut names: Vec<&str> = std::iter::once(systems::BASE).chain(named).collect();
    // Last, so that the first two are what is compared where nothing is said.
    if items.iter().any(|item| item.prompted.is_some()) {
        systems.push(System::prompted(base));
        names.push(systems::PROMPTED);
    }
    let decoding = Decoding {
        sampling: Sampling {
            temperature: settings.temperature as f32,
            top_k: settings.top_k,
            top_p: settings.top_p as f32,
            seed: settings.seed,
        },
        max_new_tokens: settings.max_new_tokens,
        stop_ids: setup.stop_ids.clone(),
        slots: settings.batch_size,
    };
    // Slots run empty at a block's end; a few of their fillings make that small.
    let blocks = items.chunks(settings.batch_size.saturating_mul(4));
    let mut room = Room::new(&model, &systems, blocks.clone(), &decoding)?;
    decode_into_the_rest(app, &mut model)?;
    let mut tallies: Vec<Tally> = systems.iter().map(|_| Tally::new()).collect();
    let total = (items.len() * systems.len()) as u64;
    let under_way = UnderWay::new(app, total, journal.is_some())?;
    let (mut replies, mut first) = (0, 0);
    for block in blocks {
        let mut answers = Vec::new(); // [systems][items of the block]
        for system in &systems {
            let name = &system.name;
            let kept = journal.as_mut().and_then(|j| j.take(first, name));
            answers.push(match kept {
                Some(answers) => answers,
                None => {
                    let said = |done| under_way.at(replies + done as u64, name);
                    let new = system.answer(&model, &mut room, block, first, &decoding, said)?;
                    if let Some(journal) = &mut journal {
                        journal.keep(first, name, &new)?;
                    }
                    new
                }
            });
            replies += block.len() as u64;
            if let Some(journal) = &journal {
                under_way.heed_requests(replies, journal)?;
            }
        }
        for (i, item) in block.iter().enumerate() {
            let mut fields = Vec::new();
            for ((&name, tally), answers) in names.iter().zip(&mut tallies).zip(&answers) {
                let answer = answers.get(i).context("a system left an item unanswered")?;
                fields.push((name, tally.add(item, answer, &setup.chat)?));
            }
            out.json(&ItemLine {
                v: record::VERSION,
                id: &item.id,
                conversation_id: &item.conversation_id,
                split_group: &item.split_group,
                tweet: &item.tweet,
                reference: &item.reference,
                reference_tokens: item.plain.reference_tokens(),
                systems: Ordered(fields),
            })?;
        }
        out.flush()?;
        first += block.len() as u32;
    }
    if let Some(why) = model.backend().unrecorded() {
        app.detail(format_args!("decoding was slower than it could be: {why}"));
    }
    Ok(names
        .into_iter()
        .zip(tallies.iter().map(Tally::scores))
        .collect())
}
