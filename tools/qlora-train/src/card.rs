//! The model card that goes with an adapter, and `qlora-train card`, which adds to
//! it what was found out later.
//!
//! It is a function of the run and of what the steps before it left, without a date
//! or a machine, so that an interrupted run leaves the same card. What is not known
//! is said to be unknown.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use cli::{App, Failure, counted};
use comparison::{Comparison, Test, figure, system};
use jsonl::{Lines, Records, write_atomically};
use serde::Serialize;
use settings::{LmHead, LossOn, Optim, Quantization, TargetModules, TextChoice, TrainSettings};

use crate::commands::Messages;
use crate::folder::{Figures, Identity};
use crate::origin::Origin;
use crate::rows::Rows;
use crate::schedule::warmup;

/// What a card is made of.
pub struct Card<'a> {
    /// All settings.
    pub settings: &'a TrainSettings,
    /// What the run is.
    pub identity: &'a Identity,
    /// Where it is going to lie.
    pub folder: &'a Path,
    /// What was learnt, and what was held out.
    pub rows: &'a Rows,
    /// Where the model and the rows come from.
    pub origin: &'a Origin,
    /// Every step's figures.
    pub figures: &'a [Figures],
    /// Updates done.
    pub steps: u64,
    /// The step whose parameters these are, where it is not the last.
    pub best: Option<u64>,
    /// Held-out loss of these parameters.
    pub eval_loss: Option<f64>,
    /// First steps of each row of spikes.
    pub spikes: &'a [u64],
}

/// Evaluations in the table at most: the first, the last and some between.
const CURVE: usize = 8;

/// Between these stands what [`AddToCard`] writes.
const EVALUATION: [&str; 2] = ["<!-- evaluation -->", "<!-- end of evaluation -->"];

/// Markdown with the front matter that model hubs read.
///
/// # Errors
/// If the system does not tell where the adapter's folder is.
pub fn render(card: &Card<'_>) -> Result<String> {
    let mut out = String::new();
    let seen = seen_from(card.folder, &card.settings.model.path);
    let seen = seen.with_context(|| card.folder.display().to_string())?;
    // Writing to a String cannot fail.
    let _ = card.write(&mut out, &seen);
    Ok(out)
}

/// A model's folder as it is named from within `folder`, in which the card's code
/// runs; an absolute path or a name on the hub is the same everywhere.
fn seen_from(folder: &Path, model: &str) -> std::io::Result<String> {
    let path = Path::new(model);
    if path.is_absolute() || !path.exists() {
        return Ok(hub::parts(model).0.to_owned());
    }
    // Without links, for `..` leads to the parent of what a link names.
    let from = folder.canonicalize()?;
    let to = std::env::current_dir()?.canonicalize()?.join(path);
    let common = (from.components().zip(to.components()))
        .take_while(|(a, b)| a == b)
        .count();
    let up = from.components().skip(common).map(|_| "..".as_ref());
    let down = to.components().skip(common).map(|part| part.as_os_str());
    let seen: PathBuf = up.chain(down).collect();
    Ok(seen.display().to_string())
}

impl Card<'_> {
    fn write(&self, out: &mut String, seen: &str) -> std::fmt::Result {
        let base = quoted(hub::parts(&self.settings.model.path).0);
        let kinds = self.rows.kinds;
        let (does, row) = match kinds.only_pairs() {
            true => ("replies to tweets", "tweet"),
            false => ("answers in chats", "prompt"),
        };
        writeln!(
            out,
            "---\nbase_model: {base}\nbase_model_relation: adapter\nlibrary_name: peft\n\
             pipeline_tag: text-generation\ntags: [lora, qlora, qwen3]\n---\n\n\
             # A LoRA adapter that {does}\n"
        )?;
        let shuffled = self.settings.data.shuffled_replies;
        if shuffled {
            writeln!(
                out,
                "**A control, not for use:** each {row} was trained with another {row}'s reply.\n"
            )?;
        }
        self.model(out)?;
        self.data(out)?;
        self.training(out)?;
        let later = match shuffled {
            true => "the comparison with this control stands in the card of the adapter itself.",
            false => "`make eval`, or `qlora-train card`, adds it here.",
        };
        writeln!(
            out,
            "\n## Evaluation\n\n{}\nNot recorded: {later}\n{}\n",
            EVALUATION[0], EVALUATION[1]
        )?;
        self.usage(out, seen)?;
        let writes = match kinds.only_pairs() {
            true => "one reply to one tweet",
            false => "replies",
        };
        let filtered = (self.origin.steps.iter()).any(|step| step.tool == "pair-validate");
        let (chosen, likes) = match filtered {
            true => (
                ", which passed the filters above",
                " Where a filter goes by likes: they measure attention, neither truth nor kindness.",
            ),
            false => ("", ""),
        };
        writeln!(
            out,
            "\n## Intended use and limits\n\n\
             It writes {writes} in the manner of the replies that it was trained on{chosen}. It has learnt how \
             such replies sound. What it states as fact is the base model's guess; what was in the data, it can \
             repeat.{likes} By the hashes in `rows.jsonl` whoever has a text, or guesses it, can tell whether it was \
             in the data: leave that file, and its line in `SHA256SUMS`, out of what is published. Nothing was tested beyond the figures above. Let a person read what it writes before \
             anyone else does, and say that a machine wrote it.\n\n## Licence\n"
        )?;
        match &self.origin.licence {
            Some((licence, file)) => {
                write!(out, "The base model's is {} (its {file}). ", code(licence))?
            }
            None => write!(
                out,
                "The base model's is not recorded: its folder names none. "
            )?,
        }
        writeln!(
            out,
            "The adapter's own is not chosen yet; it has to fit that one, and the terms under which the data \
             was collected."
        )
    }

    fn model(&self, out: &mut String) -> std::fmt::Result {
        let (lora, settings) = (&self.settings.lora, self.settings);
        let targets = match &lora.target_modules {
            TargetModules::Named(name) => cell(name),
            TargetModules::List(names) => {
                names.iter().map(|n| cell(n)).collect::<Vec<_>>().join(", ")
            }
        };
        let mut kind = format!(
            "rank {}, alpha {}, dropout {}",
            lora.rank, lora.alpha, lora.dropout
        );
        for (name, pattern) in [
            ("ranks", pairs(&lora.rank_pattern)),
            ("alphas", pairs(&lora.alpha_pattern)),
        ] {
            if !pattern.is_empty() {
                write!(kind, ", other {name}: {pattern}")?;
            }
        }
        for (name, on) in [("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)] {
            if on {
                write!(kind, ", {name}")?;
            }
        }
        let mut held = spelled(&settings.model.quantization);
        if settings.model.lm_head == LmHead::Nf4 {
            held += ", lm_head in nf4";
        }
        let began = match &self.identity.init_adapter {
            Some(hash) => format!("another adapter (SHA-256 of its values {hash:.12})"),
            None => "fresh values".into(),
        };
        writeln!(
            out,
            "| | |\n|---|---|\n\
             | Base model | {} (SHA-256 of its files {:.12}) |\n\
             | Base weights in training | {} |\n\
             | Adapter | {kind}, on {targets} |\n\
             | Began from | {began} |\n\
             | Made by | qlora-train {} on {} |",
            cell(&settings.model.path),
            self.identity.model,
            held,
            self.identity.version,
            self.identity.device,
        )
    }

    fn data(&self, out: &mut String) -> std::fmt::Result {
        let (rows, data) = (self.rows, &self.settings.data);
        let text = match data.text {
            TextChoice::Normalized => "normalised",
            TextChoice::Raw => "raw",
        };
        let kinds: Vec<String> = [
            (
                rows.kinds.pairs,
                format!("tweets with replies, {text} text"),
            ),
            (rows.kinds.prompts, "prompts with completions".into()),
            (rows.kinds.conversations, "conversations".into()),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        writeln!(
            out,
            "\n## Data\n\n{} to train on, {} held out{}: {} (SHA-256 of the encoded rows {:.12}).\n",
            counted(rows.train.len(), "row"),
            rows.eval.len(),
            match rows.trained_before {
                0 => String::new(),
                n => format!(", {n} of which the adapter that it began from was trained on"),
            },
            kinds.join("; "),
            self.identity.data
        )?;
        if rows.seen.has_gap() {
            writeln!(
                out,
                "What the adapter that it began from was trained on is not known in full: rows that are held out \
                 here may be among that.\n"
            )?;
        }
        writeln!(
            out,
            "| Step | Rows in | Rows out | Refused or dropped |\n|---|---|---|---|"
        )?;
        for step in &self.origin.steps {
            let mut reasons: Vec<_> = step.reasons.iter().collect();
            reasons.sort_by_key(|&(_, &count)| std::cmp::Reverse(count));
            let mut reasons: Vec<String> = reasons
                .into_iter()
                .map(|(reason, count)| format!("{} {count}", cell(reason)))
                .collect();
            if step.bad_lines > 0 {
                reasons.push(format!("malformed {}", step.bad_lines));
            }
            writeln!(
                out,
                "| {} | {} | {} | {} |",
                cell(&step.tool),
                step.read,
                step.written,
                if reasons.is_empty() {
                    "none".into()
                } else {
                    reasons.join(", ")
                }
            )?;
        }
        let kept = rows.train.len() + rows.eval.len();
        let mut refused = Vec::new();
        for (count, what) in [(rows.left_out, "too long"), (rows.cut, "cut, and kept")] {
            if count > 0 {
                refused.push(format!("{what} {count}"));
            }
        }
        writeln!(
            out,
            "| `qlora-train` | {} | {kept} | {} |\n",
            kept + rows.left_out,
            if refused.is_empty() {
                "none".into()
            } else {
                refused.join(", ")
            }
        )?;
        if self.origin.steps.is_empty() {
            return writeln!(
                out,
                "What was done to the rows before is not recorded (`--provenance`), nor how they were collected."
            );
        }
        let settings: Vec<&str> = (self.origin.steps.iter())
            .flat_map(|step| &step.settings)
            .map(String::as_str)
            .collect();
        writeln!(out, "A pair can be refused for several reasons.")?;
        if !settings.is_empty() {
            writeln!(
                out,
                "The steps went by these settings:\n\n{}",
                fenced("", &settings.join("\n"))
            )?;
        }
        writeln!(out, "How the rows were collected is not recorded.")
    }

    fn training(&self, out: &mut String) -> std::fmt::Result {
        let (t, lora) = (&self.settings.training, &self.settings.lora);
        write!(
            out,
            "\n## Training\n\n{} of {}, learning rate {}, {}, warm-up steps {}, weight decay {}, {}, {}",
            counted(self.steps as usize, "step"),
            counted(t.batch_size * t.gradient_accumulation_steps, "row"),
            t.learning_rate,
            spelled(&t.lr_scheduler),
            warmup(t, self.steps),
            t.weight_decay,
            match t.max_grad_norm {
                0.0 => "gradients unclipped".into(),
                most => format!("gradient norm at most {most}"),
            },
            match t.optim {
                Optim::AdamW => "AdamW",
                Optim::AdamW8bit => "AdamW with moments in 8 bits",
            }
        )?;
        if lora.lr_ratio != 1.0 {
            write!(out, ", LoRA+ ratio {}", lora.lr_ratio)?;
        }
        if let Some(alpha) = t.neftune_noise_alpha {
            write!(out, ", NEFTune alpha {alpha}")?;
        }
        let on = match self.settings.data.loss_on {
            LossOn::Reply => "reply",
            LossOn::All => "whole conversation",
        };
        writeln!(out, ", seed {}, loss on the {on}.\n", t.seed)?;

        let mut losses = self
            .figures
            .iter()
            .filter_map(|line| Some((line.step, line.loss?)));
        let first = losses.next();
        if let Some((first, before)) = first {
            let (last, after) = losses.next_back().unwrap_or((first, before));
            writeln!(
                out,
                "Training loss {before:.4} at step {first}, {after:.4} at step {last}, in nats a token."
            )?;
        }
        if let Some(step) = self.best {
            writeln!(
                out,
                "The adapter is that of step {step}, the best held-out loss."
            )?;
        }
        if !self.spikes.is_empty() {
            let steps: Vec<String> = self.spikes.iter().map(u64::to_string).collect();
            writeln!(
                out,
                "Loss or gradient norm spiked at step {}.",
                steps.join(", ")
            )?;
        }
        let curve: Vec<(u64, f64)> = (self.figures.iter())
            .filter_map(|line| Some((line.step, line.eval_loss?)))
            .collect();
        match self.eval_loss {
            None => writeln!(out, "There were no held-out rows.")?,
            Some(loss) => {
                writeln!(
                    out,
                    "Held-out loss after training: {loss:.4} nats a token (perplexity {:.3}).\n\n\
                     | Step | Held-out loss | Perplexity |\n|---:|---:|---:|",
                    loss.exp()
                )?;
                for (step, loss) in spread(&curve, CURVE) {
                    writeln!(out, "| {step} | {loss:.4} | {:.3} |", loss.exp())?;
                }
                let chose = match (t.load_best_model_at_end, t.early_stopping_patience) {
                    (true, _) => Some("which step's adapter this is"),
                    (false, 0) => None,
                    (false, _) => Some("when to stop"),
                };
                if let Some(chose) = chose {
                    writeln!(
                        out,
                        "\nThe held-out rows chose {chose}: what is measured on them, here and under \
                         Evaluation, is somewhat too good."
                    )?;
                }
            }
        }
        writeln!(
            out,
            "\nEvery step's figures are in `metrics.jsonl`, every setting in `train.yaml`."
        )
    }

    fn usage(&self, out: &mut String, base: &str) -> std::fmt::Result {
        let (data, lora, kinds) = (&self.settings.data, &self.settings.lora, self.rows.kinds);
        writeln!(
            out,
            "## Use\n\nThe prompt is the model's own chat template with `enable_thinking=False`."
        )?;
        if kinds.conversations > 0 {
            writeln!(
                out,
                "The conversations had the system prompts that they came with."
            )?;
        }
        // Conversations are taken as they are.
        let single = kinds.pairs + kinds.prompts > 0;
        let system_prompt = match single {
            true => data.system_prompt.as_str(),
            false => "",
        };
        match system_prompt {
            "" if single => writeln!(out, "There is no system prompt.")?,
            "" => {}
            prompt => writeln!(out, "The system prompt:\n\n{}", fenced("", prompt))?,
        }
        if kinds.pairs > 0 {
            match data.prompt_template.as_str() {
                "{{ tweet }}" => writeln!(out, "The user's turn is the tweet.")?,
                template => writeln!(
                    out,
                    "The user's turn, a Jinja template over the pair's fields:\n\n{}",
                    fenced("jinja", template)
                )?,
            }
        }
        let said = match (kinds.only_pairs(), data.prompt_template.as_str()) {
            (true, "{{ tweet }}") => "the tweet",
            _ => "the user's turn",
        };
        let system = match system_prompt {
            "" => String::new(),
            prompt => format!(
                "{{\"role\": \"system\", \"content\": {}}}, ",
                quoted(prompt)
            ),
        };
        let revision = hub::parts(&self.settings.model.path).1;
        let at = revision.map_or(String::new(), |name| format!(", revision={}", quoted(name)));
        let note = match base == self.settings.model.path || revision.is_some() {
            true => "",
            false => "  # where it was in training, seen from this folder",
        };
        let script = format!(
            "from peft import PeftModel\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             base = {}{note}\n\
             tokenizer = AutoTokenizer.from_pretrained(base{at})\n\
             model = AutoModelForCausalLM.from_pretrained(base{at}, dtype=\"auto\")\n\
             model = PeftModel.from_pretrained(model, \".\")  # this folder\n\
             messages = [{system}{{\"role\": \"user\", \"content\": \"{said}\"}}]\n\
             prompt = tokenizer.apply_chat_template(\n    \
                 messages, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors=\"pt\"\n)\n\
             reply = model.generate(**prompt, max_new_tokens=96)[0, prompt[\"input_ids\"].shape[1] :]\n\
             print(tokenizer.decode(reply, skip_special_tokens=True))",
            quoted(base)
        );
        let four_bits = match (
            self.settings.model.quantization,
            self.settings.model.lm_head,
        ) {
            (Quantization::Nf4, LmHead::AsStored) => {
                ", here over the base as it is; it was trained over NF4 (`load_in_4bit`), which is close"
            }
            (Quantization::Nf4, LmHead::Nf4) => {
                ", here over the base as it is; it was trained over NF4, `lm_head` included, which is close"
            }
            (Quantization::None, LmHead::Nf4) => {
                ", here over the base as it is; it was trained over `lm_head` in NF4, which is close"
            }
            (Quantization::None, LmHead::AsStored) => "",
        };
        writeln!(
            out,
            "\nIn this folder, with PEFT{four_bits}:\n\n{}",
            fenced("python", &script)
        )?;
        if lora.use_dora || !lora.rank_pattern.is_empty() || !lora.alpha_pattern.is_empty() {
            return writeln!(
                out,
                "vLLM takes neither DoRA nor ranks of their own: `qlora-train merge` writes the whole model, \
                 also for llama.cpp and Ollama (`--gguf`)."
            );
        }
        // The ranks that vLLM has room for.
        let ranks = [8, 16, 32, 64, 128, 256, 320, 512];
        let room = ranks.into_iter().find(|&room| room >= lora.rank);
        if let Some(room) = room {
            let at = revision.map_or(String::new(), |name| format!(" --revision {}", shell(name)));
            let serve = format!(
                "vllm serve {}{at} --enable-lora --max-lora-rank {room} --lora-modules replies=.",
                shell(base)
            );
            writeln!(
                out,
                "With vLLM, and `\"chat_template_kwargs\": {{\"enable_thinking\": false}}` in each request to the \
                 model `replies`:\n\n{}",
                fenced("sh", &serve)
            )?;
        }
        writeln!(
            out,
            "For llama.cpp and Ollama: `qlora-train merge --gguf` writes the whole model."
        )
    }
}

/// Add to an adapter's card how its replies were found to be
///
/// Writes the comparisons of sigtest's lines into the section Evaluation of
/// ADAPTER/README.md, in place of what stands there or at its end. Nothing else is
/// changed.
#[derive(Args)]
#[command(name = "card", after_long_help = crate::commands::after_help(EXAMPLES, None))]
pub struct AddToCard {
    /// Lines of sigtest, as `make eval` leaves them in output/eval/RUN/tests.jsonl
    #[arg(long, value_name = "FILE")]
    evaluation: PathBuf,
    /// The adapter's folder
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    #[command(flatten)]
    pub messages: Messages,
}

const EXAMPLES: &str = "
$ qlora-train card --evaluation tests.jsonl adapter
";

impl AddToCard {
    /// Does it.
    pub fn run(&self, app: &App) -> Result<()> {
        let path = self.adapter.join("README.md");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            let remedy = "name the folder of an adapter that qlora-train has finished";
            Failure::Usage(format!("{}: {error}; {remedy}", path.display()))
        })?;
        let mut lines = Records::new(Lines::open(&self.evaluation)?, app.name(), 0);
        let mut tests = Vec::new();
        while let Some((_, test)) = lines.next_with(&mut std::io::sink(), |line| Test::of(&line))? {
            tests.push(test);
        }
        if tests.is_empty() {
            let cause = "no lines: there is nothing to add";
            return Err(Failure::Input(format!("{}: {cause}", self.evaluation.display())).into());
        }
        let mut section = String::new();
        write_tests(&mut section, &tests).context("writing the section")?;
        // A card without the marks is someone else's: the section goes to its end.
        let heading = "\n## Evaluation\n\n";
        let (before, after) = match (
            text.split_once(EVALUATION[0]),
            text.split_once(EVALUATION[1]),
        ) {
            (Some((before, _)), Some((_, after))) => (before.to_owned(), after),
            _ => (format!("{text}{heading}"), "\n"),
        };
        let new = [&before, EVALUATION[0], "\n", &section, EVALUATION[1], after].concat();
        // Where nothing is new, the file stays untouched: make goes by dates.
        if new != text {
            write_atomically(&path, new.as_bytes())?;
        }
        app.info(format_args!("{} has the figures", path.display()));
        Ok(())
    }
}

/// A table a comparison, and how all are to be read.
fn write_tests(out: &mut String, tests: &[Test]) -> std::fmt::Result {
    let comparisons = comparison::comparisons(tests);
    for comparison in &comparisons {
        compare(out, comparison)?;
    }
    let legend = comparison::legend(tests).into_iter();
    let more = comparison::lacking(&comparisons)
        .into_iter()
        .map(String::from);
    let said = legend.chain(comparison::withheld(&comparisons)).chain(more);
    let said: Vec<String> = said.map(|text| markdown(&text)).collect();
    writeln!(out, "\n{}\n", said.join(" "))
}

/// The table of one comparison.
fn compare(out: &mut String, c: &Comparison) -> std::fmt::Result {
    let [a, b] = [c.a, c.b].map(|path| cell(system(path)));
    let judged = match (c.is_of_verdicts(), c.judge) {
        (false, _) => String::new(),
        (true, None) => ", by the judge".into(),
        (true, Some(judge)) => format!(", by the judge {}", code(judge)),
    };
    writeln!(
        out,
        "\n{b} against {a}{judged}, {}:\n\n\
         | Figure | {a} | {b} | {} of {b} − {a} | p |\n|---|---:|---:|---:|---:|",
        c.rows,
        c.level()
    )?;
    for of in &c.figures {
        let mean = |x: Option<f64>| x.map_or("-".into(), |x| figure(x, ""));
        let [mean_a, mean_b] = of.means.map(mean);
        writeln!(
            out,
            "| {} | {mean_a} | {mean_b} | {} | {}{} |",
            cell(of.metric),
            of.interval(),
            markdown(&of.p()),
            if of.star() { r" \*" } else { "" }
        )?;
    }
    for note in &c.notes {
        writeln!(out, "\n{}.", note.said(cell, code))?;
    }
    for text in c.never.as_deref().into_iter().chain(c.of_judge()) {
        writeln!(out, "\n{text}")?;
    }
    writeln!(out, "\n{}", code(c.signature))
}

/// A sentence of ours, of which no sign is to be one of Markdown's.
fn markdown(text: &str) -> String {
    text.replace('*', r"\*")
        .replace('<', r"\<")
        .replace('_', r"\_")
}

/// Up to `most` items, the first, the last and evenly between.
fn spread<T: Copy>(items: &[T], most: usize) -> Vec<T> {
    let (n, last) = (items.len().min(most), items.len().saturating_sub(1));
    (0..n).map(|i| items[i * last / (n - 1).max(1)]).collect()
}

/// `name 32, other 8`
fn pairs<'a, T: std::fmt::Display + 'a>(
    pattern: impl IntoIterator<Item = (&'a String, &'a T)>,
) -> String {
    let pairs = pattern
        .into_iter()
        .map(|(name, value)| format!("{} {value}", cell(name)));
    pairs.collect::<Vec<_>>().join(", ")
}

/// A choice as the settings spell it.
fn spelled(choice: &impl Serialize) -> String {
    // A variant without fields, which serialises as its name.
    let value = serde_json::to_value(choice).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// In double quotes, as JSON, YAML and Python read it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// One word to a shell.
fn shell(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// Markdown's inline code; line breaks become spaces.
fn code(text: &str) -> String {
    let text = text.replace(['\n', '\r'], " ");
    let fence = "`".repeat(longest_run(&text) + 1);
    let pad = if text.starts_with('`') || text.ends_with('`') {
        " "
    } else {
        ""
    };
    format!("{fence}{pad}{text}{pad}{fence}")
}

/// The same in a table, where a bar would end the cell even so.
fn cell(text: &str) -> String {
    code(text).replace('|', r"\|")
}

/// A block of code.
fn fenced(language: &str, text: &str) -> String {
    let fence = "`".repeat((longest_run(text) + 1).max(3));
    let text = text.trim_end_matches('\n');
    format!("{fence}{language}\n{text}\n{fence}\n")
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use record::Record;

    #[test]
    fn no_text_breaks_out_of_its_place() {
        assert_eq!(code("a `b` c"), "``a `b` c``");
        assert_eq!(code("`"), "`` ` ``");
        assert_eq!(cell("a|b\n| c"), r"`a\|b \| c`");
        assert_eq!(fenced("sh", "x\n```\ny\n"), "````sh\nx\n```\ny\n````\n");
        assert_eq!(shell("Qwen/Qwen3-8B"), "Qwen/Qwen3-8B");
        assert_eq!(shell("it's; rm"), r"'it'\''s; rm'");
        assert_eq!(quoted("a\"b\n"), r#""a\"b\n""#);
    }

    /// The section that a file of sigtest's lines makes; each is a metric, a test and more.
    fn section(side: &str, lines: &[(&str, &str, &str)]) -> String {
        let tests: Vec<Test> = (lines.iter())
            .map(|(metric, test, more)| {
                let line = format!(
                    r#"{{"a":"{side}.base","b":"{side}.lora","metric":"{metric}","test":"{test}","mean_a":0.25,"mean_b":0.5,{more}}}"#
                );
                Test::of(&Record::parse(&line).unwrap()).unwrap()
            })
            .collect();
        let mut out = String::new();
        write_tests(&mut out, &tests).unwrap();
        out
    }

    const SIGNED: &str =
        r#""signature":"tool:sigtest|a:x|alpha:0.9|alternative:two-sided|alpha:0.1""#;

    #[test]
    fn the_interval_is_that_of_the_test_beside_it() {
        let bootstrap = format!(r#""n":9,"ci_low":-3.0,"ci_high":-2.0,{SIGNED}"#);
        let line = |more: &str| {
            let permutation = format!(r#""n":9,"p_holm":0.5,{more}{SIGNED}"#);
            section(
                "systems",
                &[
                    ("nll", "permutation", &permutation),
                    ("nll", "bootstrap", &bootstrap),
                ],
            )
        };
        let own = line(r#""ci_low":-1.0,"ci_high":0.0,"#);
        assert!(own.contains("| 90% of `lora` − `base` |"), "{own}");
        assert!(own.contains("| +0.000 to +1.000 | 0.5000 |"), "{own}");
        let open = line(r#""ci_low":-1.0,"ci_high":null,"#);
        assert!(open.contains("| to +1.000 | 0.5000 |"), "{open}");
        let none = line(r#""ci_low":null,"ci_high":null,"ci_reason":"too | few","#);
        assert!(none.contains("| - | 0.5000 |"), "{none}");
        assert!(none.contains("`nll`: no interval: `too | few`."), "{none}");
        // From before it had an interval.
        let old = line("");
        assert!(old.contains("| +2.000 to +3.000 | 0.5000 |"), "{old}");
    }

    #[test]
    fn the_section_says_what_its_figures_speak_of() {
        let judge = r#""n":55,"missing":42,"unpaired":3,"clusters":20,"p_holm":0.001,"ci_low":-1.0,"ci_high":-0.5,"signature":"tool:sigtest|judge:a `b`|alternative:two-sided|alpha:0.05""#;
        let gaps = section(
            "verdicts.score",
            &[("verdicts.score", "permutation", judge)],
        );
        for words in [
            "`lora` against `base`, by the judge `` a `b` ``, 55 of 100 held-out rows in 20 groups \
             (42 without a figure on either side, 3 on one):",
            r"No \* where over 5% of the rows lack the figure on a side",
            "permutation test (two-sided), adjusted over the figures of a table (Holm), over these \
             held-out rows, for this one adapter (one seed, one decoding);",
            "not adjusted",
            "No prompted base",
        ] {
            assert!(gaps.contains(words), "{words}\n{gaps}");
        }
        // Gaps that differ are told of each figure.
        let whole =
            format!(r#""n":40,"unpaired":0,"missing":0,"clusters":20,"p_holm":0.1,{SIGNED}"#);
        let part = format!(
            r#""n":38,"unpaired":1,"missing":1,"clusters":19,"p_holm":null,"reason":"every difference is zero",{SIGNED}"#
        );
        let two = section(
            "systems",
            &[
                ("nll", "permutation", &whole),
                ("chrf", "permutation", &part),
            ],
        );
        for words in [
            "`lora` against `base`, 40 held-out rows in 20 groups:",
            "`chrf`: no interval, no p: `every difference is zero`.",
            "means over rows",
            "`chrf`: 38 of 40 held-out rows in 19 groups (1 without a figure on either side, 1 on one).",
        ] {
            assert!(two.contains(words), "{words}\n{two}");
        }
        assert!(!two.contains("lack the figure"), "{two}");
        let offline = judge.replace("judge:a `b`", "judge:reference-chrf-rank");
        let offline = section(
            "verdicts.score",
            &[("verdicts.score", "permutation", &offline)],
        );
        assert!(
            offline.contains("Offline: to the point or not"),
            "{offline}"
        );
        assert!(offline.contains("| `score` |"), "{offline}");
    }

    #[test]
    fn a_base_is_named_from_where_the_code_runs() {
        let here = std::env::current_dir().unwrap();
        let folder = here.join("src/inspect");
        let seen = |model: &str| seen_from(&folder, model).unwrap();
        assert_eq!(seen("src/main.rs"), "../main.rs");
        assert_eq!(seen("Cargo.toml"), "../../Cargo.toml");
        assert_eq!(seen("src/inspect/model.rs"), "model.rs");
        assert!(folder.join(seen("../gen-eval/src")).is_dir());
        assert_eq!(seen("/some/where"), "/some/where");
        assert_eq!(seen("Qwen/Qwen3-8B@v1"), "Qwen/Qwen3-8B");
    }

    #[test]
    fn a_long_curve_keeps_its_ends() {
        let long: Vec<u64> = (0..100).collect();
        assert_eq!(spread(&long, 8), [0, 14, 28, 42, 56, 70, 84, 99]);
        assert_eq!(spread(&long[..3], 8), [0, 1, 2]);
        assert_eq!(spread(&long[..1], 8), [0]);
        assert!(spread(&long[..0], 8).is_empty());
    }
}
