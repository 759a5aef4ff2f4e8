//! gen-eval through the real binary: its scores against the Python packages', its
//! likelihoods and greedy replies against an independent forward pass.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, IndexOp};
use harness::server::{Reply, Server};
use harness::{Conventions, Run, Tool};
use qwen3::{Chat, Checkpoint, LossOn, Message, PromptTemplate, Seen, Wording};
use record::{Record, Split};
use serde_json::{Value, json};
use tiny_model::autograd::{Batch, Config, Lora, Model, TARGETS};

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_gen-eval"))
}

fn parity(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/parity")
        .join(name)
}

fn predictions() -> String {
    let rows = [
        ("the cat sat", "the cat sat on the mat"),
        ("😀", "so true!"),
        ("no idea", "no idea at all, 3.5% maybe"),
    ];
    rows.iter()
        .map(|(p, r)| format!("{}\n", json!({ "v": 1, "prediction": p, "reference": r })))
        .collect()
}

harness::conventions!(|| {
    let conventions = Conventions {
        arguments: vec!["--score-only".into()],
        rejects: "--rejects",
        input: predictions(),
        empty: 0,
        key: "generation.batch_size",
        passes_records: true,
    };
    (tool(), conventions)
});

/// The dump is explained in tests/parity/textmetrics; textmetrics itself is held to
/// it figure by figure, so this is about units, names and the corpus line.
#[test]
fn score_only_prints_what_rouge_score_and_sacrebleu_print() {
    let dump = std::fs::read_to_string(parity("textmetrics/cases.jsonl")).unwrap();
    let lines: Vec<Value> = dump
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (pairs, slices): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["slice"].is_null());
    let whole = slices
        .iter()
        .find(|line| line["slice"] == json!([0, pairs.len()]))
        .unwrap();
    let input: String = pairs
        .iter()
        .map(|p| {
            format!(
                "{}\n",
                json!({ "prediction": p["prediction"], "reference": p["reference"] })
            )
        })
        .collect();
    let mut ours = tool().run(&["--score-only"], &input).exits(0).records();

    let near = |ours: &Value, theirs: &Value, what: &str| {
        let (ours, theirs) = (ours.as_f64().unwrap(), theirs.as_f64().unwrap());
        assert!(
            (ours - theirs).abs() < 1e-12,
            "{what}: {ours} instead of {theirs}"
        );
    };
    let corpus = ours.pop().unwrap()["corpus"].take();
    assert_eq!(ours.len(), pairs.len());
    for (ours, pair) in ours.iter().zip(&pairs) {
        let expected = &pair["expected"];
        for rouge in ["rouge1", "rouge2", "rougeL"] {
            near(&ours[rouge], &expected[rouge][2], rouge);
        }
        near(&ours["bleu"], &expected["bleu"], "bleu");
        near(&ours["chrf"], &expected["chrf"], "chrf");
    }
    for figure in ["bleu", "chrf", "chrf++", "distinct_1", "distinct_2"] {
        near(&corpus[figure], &whole["expected"][figure], figure);
    }
    let signature = corpus["bleu_signature"].as_str().unwrap();
    assert!(
        signature.starts_with("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"),
        "{signature}"
    );
}

/// A random Qwen3 small enough to be run token by token, with the tokenizer and
/// template of tests/parity/chat.
struct Fixture {
    tool: Tool,
    config: Config,
}

const TEXTS: [(&str, &str); 7] = [
    ("Anyone else up this early?", "Every day since 1998!"),
    (
        "My cat sat on the keyboard again",
        "Then the cat wrote this tweet, right?",
    ),
    ("Rain all week 🌧️", "Good for the garden"),
    (
        "What do you read on trains?",
        "The other passengers' newspapers",
    ),
    ("Bread is just slow magic", "And toast is the encore"),
    ("I painted the door blue", "Which blue? There are forty"),
    ("Monday", "No"),
];

impl Fixture {
    fn new() -> Self {
        let config = Config {
            vocab_size: 649,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            tie_word_embeddings: true,
        };
        let fixture = Self {
            tool: tool(),
            config,
        };
        // Wide enough that the likeliest token is so by more than rounding.
        let model = Model::random(fixture.config.clone(), 0.25, DType::F32, 7).unwrap();
        let mut config = serde_json::to_value(&fixture.config).unwrap();
        for (key, value) in [
            ("architectures", json!(["Qwen3ForCausalLM"])),
            ("model_type", json!("qwen3")),
            ("hidden_act", json!("silu")),
            ("attention_bias", json!(false)),
            ("max_position_embeddings", json!(192)),
        ] {
            config[key] = value;
        }
        fixture.tool.file("model/config.json", &config.to_string());
        fixture.tool.file(
            "model/generation_config.json",
            &json!({ "eos_token_id": [642, 640] }).to_string(),
        );
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ] {
            std::fs::copy(
                parity("chat/model").join(name),
                fixture.folder("model").join(name),
            )
            .unwrap();
        }
        save(&fixture.folder("model/model.safetensors"), model.weights);
        fixture.adapter("run1", 3);
        fixture.adapter("run2", 4);
        fixture.tool.file("pairs.jsonl", &fixture.pairs());
        fixture.tool.file("predictions.jsonl", &predictions());
        fixture
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.tool.folder().join(name)
    }

    /// An adapter of rank 2 and scale 3 in PEFT's files, written without our own code.
    fn adapter(&self, name: &str, seed: u64) -> Lora {
        let lora = Lora::random(&self.config, &TARGETS, 2, 3.0, 0.2, DType::F32, seed).unwrap();
        let modules: Vec<_> = TARGETS
            .iter()
            .map(|t| t.rsplit('.').next().unwrap())
            .collect();
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "lora_dropout": 0.1,
            "target_modules": modules, "bias": "none", "base_model_name_or_path": "model"
        });
        self.tool
            .file(&format!("{name}/adapter_config.json"), &config.to_string());
        save(
            &self.folder(name).join("adapter_model.safetensors"),
            lora.tensors.clone(),
        );
        lora
    }

    /// Seven pairs; the first, third and sixth are trained on.
    fn pairs(&self) -> String {
        let mut text = String::new();
        for (i, (tweet, reply)) in TEXTS.iter().enumerate() {
            let split = if [0, 2, 5].contains(&i) {
                "train"
            } else {
                "eval"
            };
            let pair = json!({
                "v": 1, "id": format!("p{i}"), "conversation_id": format!("c{}", i / 2), "split": split,
                "tweet": tweet.to_uppercase(), "reply": reply.to_uppercase(), "tweet_normalized": tweet, "reply_normalized": reply
            });
            writeln!(text, "{pair}").unwrap();
        }
        text
    }

    fn run(&self, more: &[&str]) -> Run {
        let mut arguments = vec![
            "--model=model",
            "--quantization=none",
            "--max-new-tokens=12",
        ];
        arguments.extend(more);
        self.tool.run(&arguments, &self.pairs())
    }

    fn chat(&self) -> Chat {
        Chat::load(&self.folder("model")).unwrap()
    }

    /// The same model in another implementation, in f64.
    fn oracle(&self) -> Model {
        Model::load(&self.folder("model"), DType::F64).unwrap()
    }
}

fn save(path: &Path, tensors: impl IntoIterator<Item = (String, candle_core::Tensor)>) {
    let tensors: HashMap<String, candle_core::Tensor> = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn to_f64(mut lora: Lora) -> Lora {
    for tensor in lora.tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::F64).unwrap();
    }
    lora
}

/// The oracle's mean NLL of the last reply, and of how many tokens.
fn oracle_nll(fixture: &Fixture, lora: Option<&Lora>, messages: &[Message]) -> (f64, usize) {
    let row = fixture
        .chat()
        .encode_training(messages, &[], LossOn::Reply)
        .unwrap();
    let mut batch = Batch::default();
    batch.push(&row.ids, &row.labelled);
    let nll = fixture
        .oracle()
        .nll(&batch, lora)
        .unwrap()
        .to_vec1::<f64>()
        .unwrap();
    let from_end = row.labelled.iter().rev().skip_while(|l| !**l);
    let tokens = from_end.take_while(|l| **l).count();
    let nll = &nll[nll.len() - tokens..];
    (nll.iter().sum::<f64>() / tokens as f64, tokens)
}

/// The oracle's greedy reply, the whole text run again for every token.
fn oracle_reply(
    fixture: &Fixture,
    lora: Option<&Lora>,
    messages: &[Message],
    longest: usize,
) -> String {
    let (chat, model) = (fixture.chat(), fixture.oracle());
    let mut ids = chat.encode_prompt(messages, &[]).unwrap();
    let prompt = ids.len();
    while ids.len() < prompt + longest {
        let mut batch = Batch::default();
        batch.push(&ids, &vec![false; ids.len()]);
        let logits = model
            .logits(&batch, lora)
            .unwrap()
            .i(ids.len() - 1)
            .unwrap();
        let next = logits.argmax(0).unwrap().to_scalar::<u32>().unwrap();
        if [642, 640].contains(&next) {
            break;
        }
        ids.push(next);
    }
    chat.decode(&ids[prompt..]).unwrap().trim().to_owned()
}

/// f32 products summed in another order than the oracle's f64: the largest
/// difference over the ten figures below is 2.7e-7 of about 7 (the test prints it).
const NLL_TOLERANCE: f64 = 2e-6;

#[test]
fn likelihoods_and_greedy_replies_are_those_of_an_independent_model() {
    let fixture = Fixture::new();
    let lora = to_f64(fixture.adapter("run1", 3));
    let lines = fixture
        .run(&["--adapter=run1"])
        .exits(0)
        .says("4 rows of `split: eval` kept, 3")
        .records();
    let (corpus, items) = lines.split_last().unwrap();
    assert_eq!(
        items
            .iter()
            .map(|item| item["id"].as_str().unwrap())
            .collect::<Vec<_>>(),
        ["p1", "p3", "p4", "p6"]
    );

    let mut worst = 0.0_f64;
    for (name, lora) in [("base", None), ("lora", Some(&lora))] {
        let (mut sum, mut tokens) = (0.0, 0);
        for (item, i) in items.iter().zip([1, 3, 4, 6]) {
            let (tweet, reply) = TEXTS[i];
            assert_eq!(
                (item["tweet"].as_str(), item["reference"].as_str()),
                (Some(tweet), Some(reply))
            );
            let ours = &item["systems"][name];
            let (nll, count) = oracle_nll(
                &fixture,
                lora,
                &[Message::user(tweet), Message::assistant(reply)],
            );
            assert_eq!(item["reference_tokens"], count);
            worst = worst.max((ours["nll"].as_f64().unwrap() - nll).abs());
            sum += nll * count as f64;
            tokens += count;
            assert_eq!(
                ours["prediction"],
                oracle_reply(&fixture, lora, &[Message::user(tweet)], 12),
                "{name} on {tweet}"
            );
        }
        let ours = &corpus["corpus"]["systems"][name];
        assert_eq!(
            (ours["n"].clone(), ours["nll_tokens"].clone()),
            (json!(4), json!(tokens))
        );
        let perplexity = ours["perplexity"].as_f64().unwrap();
        worst = worst.max((perplexity.ln() - sum / tokens as f64).abs());
    }
    println!("worst difference: {worst:e}");
    assert!(worst < NLL_TOLERANCE, "{worst}");
    assert_ne!(
        items[0]["systems"]["base"]["nll"],
        items[0]["systems"]["lora"]["nll"]
    );
    let signature = corpus["corpus"]["signature"].as_str().unwrap();
    for part in [
        "tool:gen-eval|",
        "|seed:42|",
        "|config:",
        "|data:",
        "|model:",
        "|lora:",
        "|scored:normalized|",
        "|quantization:none|",
        "|lm_head:as_stored|",
    ] {
        assert!(signature.contains(part), "{part}: {signature}");
    }
}

/// Each item's text figures are those that --score-only gives the same texts.
#[test]
fn both_modes_score_alike() {
    let fixture = Fixture::new();
    let lines = fixture.run(&["--text=raw"]).exits(0).records();
    let (corpus, items) = lines.split_last().unwrap();
    let flat: String = items
        .iter()
        .map(|item| {
            let prediction = &item["systems"]["base"]["prediction"];
            format!(
                "{}\n",
                json!({ "prediction": prediction, "reference": item["reference"] })
            )
        })
        .collect();
    let scored = tool().run(&["--score-only"], &flat).exits(0).records();
    let (scored_corpus, scored) = scored.split_last().unwrap();
    for (item, scored) in items.iter().zip(scored) {
        for figure in ["rouge1", "rouge2", "rougeL", "bleu", "chrf"] {
            assert_eq!(item["systems"]["base"][figure], scored[figure], "{figure}");
        }
    }
    for figure in [
        "n",
        "bleu",
        "chrf",
        "rougeL",
        "bleu_signature",
        "length_ratio",
    ] {
        assert_eq!(
            corpus["corpus"]["systems"]["base"][figure], scored_corpus["corpus"][figure],
            "{figure}"
        );
    }
}

#[test]
fn replies_depend_on_the_seed_and_on_nothing_else() {
    let fixture = Fixture::new();
    let with = |more: &[&str]| {
        let sampled = [
            "--adapter=run1",
            "--temperature=1.5",
            "--top-p=0.95",
            "--top-k=50",
        ];
        fixture.run(&[&sampled, more].concat()).exits(0).stdout
    };
    let one = with(&["--seed=0", "--threads=1"]);
    assert_eq!(one, with(&["--seed=0", "--threads=8"]));
    assert_ne!(one, with(&["--seed=1", "--threads=1"]));
    let replies = |stdout: &str| -> Vec<Value> {
        let lines = stdout
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|line| {
                [
                    &line["systems"]["base"]["prediction"],
                    &line["systems"]["lora"]["prediction"],
                ]
                .map(Value::clone)
                .into()
            })
            .collect()
    };
    assert_eq!(
        replies(&one),
        replies(&with(&["--seed=0", "--batch-size=1"])),
        "neighbours changed a reply"
    );
}

#[test]
fn rows_without_a_side_are_all_taken_and_raw_texts_if_asked() {
    let fixture = Fixture::new();
    let unsplit = fixture
        .pairs()
        .replace(r#""split":"train","#, "")
        .replace(r#""split":"eval","#, "");
    let base = ["--model=model", "--max-new-tokens=2"];
    // More than there is room for is as many as there are.
    let most = [
        "--model=model",
        "--max-new-tokens=2",
        "--batch-size=18446744073709551615",
    ];
    let run = fixture
        .tool
        .run(&most, &unsplit)
        .exits(0)
        .says("no row has `split`: all 7 are taken");
    assert_eq!(run.records().len(), 8);
    let raw = fixture
        .tool
        .run(&[&base[..], &["--text=raw"]].concat(), &unsplit)
        .exits(0)
        .records();
    assert_eq!(raw[6]["tweet"], "MONDAY");
    let bare = "{\"v\":1,\"id\":\"1\",\"tweet\":\"t\",\"reply\":\"r\"}\n";
    fixture
        .tool
        .run(&base, bare)
        .exits(3)
        .says("-:1: ")
        .says("tweet_normalized")
        .says("--text raw");
    let none = fixture
        .pairs()
        .replace(r#""split":"eval""#, r#""split":"train""#);
    assert_eq!(fixture.tool.run(&base, &none).exits(0).stdout, "");
}

/// Prompts are those of training; where an adapter was trained with others it is said.
#[test]
fn prompts_come_from_the_training_settings() {
    let fixture = Fixture::new();
    let trained =
        "model: {path: model, quantization: none}\ndata: {text: raw, system_prompt: Be brief.}\n";
    fixture.tool.file("run1/train.yaml", trained);
    let arguments = [
        "--adapter=run1",
        "--max-new-tokens=2",
        "--prompted-examples=0",
    ];
    let lines = fixture
        .tool
        .run(&arguments, &fixture.pairs())
        .exits(0)
        .never_says("warning")
        .records();
    let messages = [
        Message::system("Be brief."),
        Message::user("MONDAY"),
        Message::assistant("NO"),
    ];
    let (nll, _) = oracle_nll(&fixture, None, &messages);
    let ours = lines[3]["systems"]["base"]["nll"].as_f64().unwrap();
    assert!(
        (ours - nll).abs() < NLL_TOLERANCE,
        "{ours} instead of {nll}"
    );

    let config = fixture
        .tool
        .file("eval.yaml", "generation: {system_prompt: Be kind.}\n");
    let run = fixture.tool.run(
        &[&arguments[..], &["--text=normalized", "--config", &config]].concat(),
        &fixture.pairs(),
    );
    run.exits(0)
        .says("adapter lora was trained with another text")
        .says("another system prompt");

    // The base too: its head in 4 bits, unless the command says otherwise.
    let four_bits = trained.replace("none}", "none, lm_head: nf4}");
    fixture.tool.file("run1/train.yaml", &four_bits);
    let run = fixture.tool.run(&arguments, &fixture.pairs()).exits(0);
    let lines = run.never_says("warning").records();
    let other = lines[3]["systems"]["base"]["nll"].as_f64().unwrap();
    let off = (other - nll).abs();
    assert!(
        off > 100.0 * NLL_TOLERANCE && off < 0.1 * nll,
        "{other} {nll}"
    );
    let stored = [&arguments[..], &["--lm-head=as_stored"]].concat();
    let run = fixture.tool.run(&stored, &fixture.pairs()).exits(0);
    let run = run.says("adapter lora was trained with another lm_head");
    assert_eq!(run.records()[3]["systems"]["base"]["nll"], ours);
    fixture
        .run(&["--adapter=run2"])
        .exits(0)
        .says("adapter lora has no train.yaml");
}

#[test]
fn the_users_turn_is_worded_as_in_training() {
    let fixture = Fixture::new();
    let trained = "model: {path: model, quantization: none}
data: {text: raw, prompt_template: 'Pair {{ id }}, {{ tweet|length }} letters: {{ tweet }}'}\n";
    fixture.tool.file("run1/train.yaml", trained);
    let arguments = [
        "--adapter=run1",
        "--max-new-tokens=2",
        "--prompted-examples=0",
    ];
    let lines = (fixture.tool.run(&arguments, &fixture.pairs()))
        .exits(0)
        .never_says("warning")
        .records();
    let messages = [
        Message::user("Pair p6, 6 letters: MONDAY"),
        Message::assistant("NO"),
    ];
    let (nll, _) = oracle_nll(&fixture, None, &messages);
    let ours = lines[3]["systems"]["base"]["nll"].as_f64().unwrap();
    assert!(
        (ours - nll).abs() < NLL_TOLERANCE,
        "{ours} instead of {nll}"
    );
    assert_eq!(lines[3]["tweet"], "MONDAY", "judged is the tweet itself");

    let ask = |template: &str| {
        let config = format!("generation: {{prompt_template: '{template}'}}\n");
        let config = fixture.tool.file("eval.yaml", &config);
        let arguments = [&arguments[..], &["--config", &config]].concat();
        fixture.tool.run(&arguments, &fixture.pairs())
    };
    ask("{{ tweet }}")
        .exits(0)
        .says("adapter lora was trained with another prompt template");
    ask("{{ reply }}")
        .exits(2)
        .says("generation.prompt_template: it names `reply`");
    ask("{{ tweed }}").exits(3).says(
        "-:1: key `tweed`: missing, and the prompt template names it; the nearest there is `tweet`",
    );
}

/// Training has to beat the base that is shown rows of the training data.
#[test]
fn the_base_is_shown_what_is_wanted() {
    let fixture = Fixture::new();
    let asked = |more: &[&str], rows: &str| {
        let model = ["--model=model", "--quantization=none", "--max-new-tokens=9"];
        fixture.tool.run(&[&model[..], more].concat(), rows)
    };
    // The texts of rows by their names, short enough that four fit into 192 positions.
    let mut texts = std::collections::BTreeMap::new();
    let mut rows = Vec::new();
    for (i, split) in ["train", "eval", "train", "train", "eval", "train", "train"]
        .into_iter()
        .enumerate()
    {
        let (id, tweet, reply) = (format!("r{i}"), format!("ask {i}"), format!("say {i}"));
        rows.push(json!({"id": id, "prompt": tweet, "completion": reply, "split": split}));
        texts.insert(id, (tweet, reply));
    }
    let hostile = [
        json!({"id": "special", "prompt": "a<|im_end|>", "completion": "b", "split": "train"}),
        json!({"id": "empty", "prompt": "a", "completion": " ", "split": "train"}),
        json!({"id": "long", "prompt": "a".repeat(4000), "completion": "b", "split": "train"}),
        json!({"id": "tools", "prompt": "a", "completion": "b", "tools": [{"name": "f"}], "split": "train"}),
        json!({"id": "turns", "split": "train", "messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}),
    ];
    rows.splice(0..0, hostile);
    let lines = |rows: &[serde_json::Value]| -> String {
        rows.iter().map(|row| format!("{row}\n")).collect()
    };
    let shown = |records: &[serde_json::Value]| -> Vec<String> {
        let prompted = &records.last().unwrap()["corpus"]["prompted"];
        let names = prompted["examples"].as_array().unwrap().iter();
        names
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    };

    let run = asked(&["--prompted-examples=4"], &lines(&rows));
    let records = run.exits(0).never_says("is shown").records();
    let examples = shown(&records);
    assert_eq!(examples.len(), 4);
    let (mut sum, mut tokens) = (0.0, 0);
    for (record, name) in records.iter().zip(["r1", "r4"]) {
        assert_eq!(record["id"], name);
        let mut messages = Vec::new();
        for name in examples.iter().map(String::as_str).chain([name]) {
            let (ask, say) = &texts[name];
            messages.extend([Message::user(ask), Message::assistant(say)]);
        }
        let ours = &record["systems"]["prompted"];
        let (nll, count) = oracle_nll(&fixture, None, &messages);
        assert_eq!(record["reference_tokens"], count);
        let off = (ours["nll"].as_f64().unwrap() - nll).abs();
        assert!(off < NLL_TOLERANCE, "{ours} instead of {nll}");
        messages.pop();
        assert_eq!(
            ours["prediction"],
            oracle_reply(&fixture, None, &messages, 9)
        );
        assert_ne!(ours["nll"], record["systems"]["base"]["nll"]);
        (sum, tokens) = (sum + nll * count as f64, tokens + count);
    }
    let corpus = &records[2]["corpus"]["systems"]["prompted"];
    let off = (corpus["nll"].as_f64().unwrap() - sum / tokens as f64).abs();
    assert!(
        off < NLL_TOLERANCE && corpus["nll_tokens"] == tokens,
        "{corpus}"
    );

    // Whatever their order; another seed draws others, and none but rows that were trained on.
    let mut turned = rows.clone();
    turned.reverse();
    let again = asked(&["--prompted-examples=4"], &lines(&turned))
        .exits(0)
        .records();
    assert_eq!(shown(&again), examples);
    let drawn = |seed: u32| {
        let seed = format!("--seed={seed}");
        shown(
            &asked(&[&seed, "--prompted-examples=2"], &lines(&rows))
                .exits(0)
                .records(),
        )
    };
    let all: std::collections::BTreeSet<String> = (0..12).flat_map(drawn).collect();
    assert_eq!(
        all.into_iter().collect::<Vec<_>>(),
        ["r0", "r2", "r3", "r5", "r6"]
    );

    // As many as there are, and as fit.
    let run = asked(&["--prompted-examples=9"], &lines(&rows)).exits(0);
    let run = run.says(
        "the system `prompted` is shown 5 of 9 examples: no more of the rows that were trained on, of one question \
         and one answer, fit into 1024 tokens",
    );
    assert_eq!(shown(&run.records()).len(), 5);
    let mut long = rows.clone();
    let question = "a b ".repeat(60);
    long.push(json!({"id": "r7", "prompt": question, "completion": "c", "split": "eval"}));
    let run = asked(&["--prompted-examples=4"], &lines(&long)).exits(0);
    let fitting = shown(&run.records());
    assert!(!fitting.is_empty() && fitting.len() < 4, "{fitting:?}");
    assert_eq!(fitting, examples[..fitting.len()]);
    run.says(&format!(
        "warning: the system `prompted` is shown {} of 4 examples: with one more, -:13: ",
        fitting.len()
    ))
    .says("tokens with its reply, more than the model's 192");

    // Told in words: in place of the system prompt that the rows have from the settings.
    let config = (fixture.tool).file("eval.yaml", "generation: {system_prompt: Be dull.}\n");
    let config = ["--config", &config, "--prompted-examples=0"];
    let said = [&config[..], &["--prompted-system=Be kind."]].concat();
    let records = asked(&said, &lines(&rows)).exits(0).records();
    for (system, prompt) in [("base", "Be dull."), ("prompted", "Be kind.")] {
        let (ask, say) = &texts["r1"];
        let messages = [
            Message::system(prompt),
            Message::user(ask),
            Message::assistant(say),
        ];
        let (nll, _) = oracle_nll(&fixture, None, &messages);
        let ours = records[0]["systems"][system]["nll"].as_f64().unwrap();
        assert!(
            (ours - nll).abs() < NLL_TOLERANCE,
            "{system}: {ours} instead of {nll}"
        );
    }
    assert_eq!(
        records[2]["corpus"]["prompted"]["system_prompt"],
        "Be kind."
    );
    let told = "a ".repeat(200);
    asked(&["--prompted-system", &told], &lines(&rows))
        .exits(3)
        .says("-:7: ")
        .says("more than the model's 192 for the system `prompted`; shorten or change generation.prompted.system_prompt");
    // A row's own system turn may hold what the question is about.
    let own = |text: &str| {
        json!({"id": "own", "split": "eval", "messages": [{"role": "system", "content": text},
            {"role": "user", "content": "ask 1"}, {"role": "assistant", "content": "say 1"}]})
    };
    let kept = asked(
        &["--prompted-examples=1", "--prompted-system=Be kind."],
        &lines(&[own("Tea."), rows[5].clone()]),
    );
    let kept = kept.exits(0).records();
    let (ask, say) = &texts["r0"];
    let messages = [
        Message::system("Tea."),
        Message::user(ask),
        Message::assistant(say),
        Message::user("ask 1"),
        Message::assistant("say 1"),
    ];
    let (nll, _) = oracle_nll(&fixture, None, &messages);
    let ours = kept[0]["systems"]["prompted"]["nll"].as_f64().unwrap();
    assert!(
        (ours - nll).abs() < NLL_TOLERANCE,
        "{ours} instead of {nll}"
    );

    // None where nothing would be said that the base is not told.
    let none = asked(&config, &lines(&rows)).exits(0).records();
    assert!(
        none[0]["systems"].get("prompted").is_none() && none[2]["corpus"].get("prompted").is_none()
    );
    let same = asked(
        &[&config[..], &["--prompted-system=Be dull."]].concat(),
        &lines(&rows),
    );
    assert!(
        same.exits(0).records()[0]["systems"]
            .get("prompted")
            .is_none()
    );
    let alone = asked(&["--prompted-system=Be kind."], &lines(&[own("Tea.")]));
    assert!(
        alone.exits(0).records()[0]["systems"]
            .get("prompted")
            .is_none()
    );
    let eval = lines(&rows[6..7]);
    let none = asked(&[], &eval)
        .exits(0)
        .says("no system `prompted`: no more")
        .records();
    assert!(none[0]["systems"].get("prompted").is_none());
    asked(&["--adapter=prompted=run1"], &eval)
        .exits(2)
        .says("`prompted` is the name of the model without an adapter");
    asked(&["--adapter=tie=run1"], &eval)
        .exits(2)
        .says("`tie` is an outcome to judge, not a system");

    // A template for one exchange alone refuses examples, and says why.
    let template = "{% if messages|length > 2 %}{{ raise_exception('one at a time') }}{% endif %}";
    let path = "model/chat_template.jinja";
    let whole = fixture.tool.read(path);
    fixture.tool.file(path, &format!("{template}{whole}"));
    let run = asked(&["--prompted-examples=2"], &lines(&rows)).exits(0);
    let run = run
        .says("no system `prompted`: with one more, -:7: ")
        .says("one at a time");
    assert!(run.records()[0]["systems"].get("prompted").is_none());
}

/// Where no row says its side, what an adapter was trained on is known by its own list.
#[test]
fn examples_are_of_the_rows_that_an_adapter_saw() {
    let fixture = Fixture::new();
    let rows: Vec<_> = (0..6)
        .map(|i| json!({"id": format!("r{i}"), "prompt": format!("ask {i}"), "completion": format!("say {i}")}))
        .collect();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let wording = Wording {
        normalized: false,
        system_prompt: String::new(),
        prompt: PromptTemplate::new("{{ tweet }}").unwrap(),
    };
    let mut seen = Seen::default();
    for i in [1, 4] {
        let record = Record::parse(&rows[i].to_string()).unwrap();
        seen.add(&wording.read(&record).unwrap().row, Split::Train);
    }
    fixture.tool.file("run1/rows.jsonl", &seen.to_lines());
    let arguments = [
        "--model=model",
        "--quantization=none",
        "--max-new-tokens=2",
        "--adapter=run1",
    ];
    let records = fixture.tool.run(&arguments, &lines).exits(0).records();
    let mut shown = records[4]["corpus"]["prompted"]["examples"].clone();
    shown
        .as_array_mut()
        .unwrap()
        .sort_by_key(|name| name.to_string());
    assert_eq!(shown, json!(["r1", "r4"]));
}

/// A prompt with its completion, or `messages`, are asked and scored as they were learnt.
#[test]
fn conversations_are_replied_to() {
    let fixture = Fixture::new();
    let (ask, reply) = ("Bread?", "And toast");
    let tool = json!({"type": "function", "function": {"name": "look", "parameters": {}}});
    let call = json!({"name": "look", "arguments": {"at": "oven"}});
    let turns = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ask},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "toast"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "Thanks"},
    ]);
    let rows = [
        json!({"prompt": ask, "completion": reply, "split": "eval"}),
        json!({"prompt": "Seen", "completion": "in training", "split": "train"}),
        json!({"id": 7, "conversation_id": "c", "messages": turns, "split": "eval"}),
        json!({"messages": turns.as_array().unwrap()[..3], "split": "eval"}),
        // Nothing that could be asked, but of use in training.
        json!({"messages": [{"role": "assistant", "content": "a"}], "split": "train"}),
    ];
    let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let arguments = ["--model=model", "--quantization=none", "--max-new-tokens=4"];
    let lines = fixture.tool.run(&arguments, &rows).exits(0).records();
    let field = |key: &str| -> Vec<&str> {
        lines[..3]
            .iter()
            .map(|line| line[key].as_str().unwrap())
            .collect()
    };
    assert_eq!(field("id"), ["line 1", "7", "line 4"]);
    assert_eq!(field("conversation_id"), ["line 1", "c", "line 4"]);
    let groups = field("split_group");
    assert!(groups[1] == "c" && groups[0] != groups[2], "{groups:?}");
    let references = field("reference");
    assert_eq!(references[..2], [reply, reply]);
    assert!(
        references[2].contains(r#"{"name": "look", "arguments": {"at": "oven"}}"#),
        "{references:?}"
    );
    let asked = field("tweet");
    assert_eq!(asked[0], ask);
    assert_eq!(
        asked[1],
        "system: Be brief.\n\nuser: Bread?\n\nassistant: \n\ntool: toast"
    );
    let (nll, tokens) = oracle_nll(
        &fixture,
        None,
        &[Message::user(ask), Message::assistant(reply)],
    );
    let ours = lines[0]["systems"]["base"]["nll"].as_f64().unwrap();
    assert!((ours - nll).abs() < NLL_TOLERANCE, "{ours}, not {nll}");
    assert_eq!(lines[0]["reference_tokens"], json!(tokens));
    // The last reply alone is scored, here the same one.
    assert_eq!(lines[1]["reference_tokens"], json!(tokens));

    for (row, said) in [
        (
            json!({"messages": [{"role": "user", "content": "u"}]}),
            "-:1: key `messages`: no turn of the assistant",
        ),
        (
            json!({"messages": [{"role": "User", "content": "u"}, {"role": "assistant", "content": "a"}]}),
            "-:1: key `messages`: turn 1: no role `User`",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "a"}], "split": "eval"}),
            "-:1: key `messages`: the assistant speaks first",
        ),
        (json!({"text": "x"}), "-:1: no row that is understood"),
        // Tools are told to the model: with them the row above is longer than it can read.
        (
            json!({"messages": turns, "tools": [tool]}),
            "tokens, more than the model's 192",
        ),
    ] {
        fixture
            .tool
            .run(&arguments, &format!("{row}\n"))
            .exits(3)
            .says(said);
    }
}

/// Rows that are no independent evidence say so, whatever they are.
#[test]
fn rows_of_one_group_name_it() {
    let fixture = Fixture::new();
    let rows = [
        json!({"id": "a", "conversation_id": "1", "split_group": "g", "tweet": "t", "reply": "r"}),
        json!({"id": "b", "conversation_id": "1", "tweet": "t", "reply": "s"}),
        json!({"id": "c", "tweet": "Bread?", "reply": "r"}),
        json!({"prompt": "Bread?", "completion": "And toast"}),
        json!({"prompt": "Bread?", "completion": "No"}),
        json!({"messages": [{"role": "user", "content": "Bread?"}, {"role": "assistant", "content": "No"}]}),
        json!({"prompt": "Toast?", "completion": "No"}),
    ];
    let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let groups = |system: &str| -> Vec<String> {
        let config = format!("generation: {{text: raw, system_prompt: '{system}'}}\n");
        let config = fixture.tool.file("eval.yaml", &config);
        let arguments = ["--model=model", "--max-new-tokens=2", "--config", &config];
        let lines = fixture.tool.run(&arguments, &rows).exits(0).records();
        let groups = lines[..7].iter().map(|line| line["split_group"].as_str());
        groups.map(|group| group.unwrap().to_owned()).collect()
    };
    let plain = groups("");
    assert_eq!(plain[..2], ["g", "1"]);
    assert!(
        plain[3..6].iter().all(|group| *group == plain[2]),
        "{plain:?}"
    );
    assert_ne!(plain[6], plain[2]);
    assert_eq!(groups("Be brief."), plain, "the settings decide");
}

/// How a reply was typed says nothing where the reference was normalised: an adapter learns
/// that way of typing, and would win by it. What was generated before is scored anew.
#[test]
fn replies_are_scored_in_the_form_of_their_reference() {
    let fixture = Fixture::new();
    let (typed, normal) = (
        "@ann “Sooooo” good… it’s a #GreatDay!!!!!",
        "\"Soo\" good... it's a Great Day!!!",
    );
    let pair = json!({
        "id": "p", "tweet": "Hm", "tweet_normalized": "Hm", "reply": typed, "reply_normalized": normal
    });
    let prompt = json!({"prompt": "Hm", "completion": normal});
    // The model says `typed`, by a journal of what it said.
    let figures = |rows: &[&Value], text: &str| -> (Vec<Value>, Value) {
        let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let arguments = [
            "--model=model",
            "--quantization=none",
            "--max-new-tokens=60",
            "--state=state",
            text,
        ];
        let _ = std::fs::remove_dir_all(fixture.folder("state"));
        fixture.tool.run(&arguments, &rows).exits(0);
        let kept = fixture.tool.read("state/answers.jsonl");
        let mut kept: Vec<Value> = (kept.lines())
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let ids = fixture.chat().encode(typed).unwrap();
        for answer in kept[1]["answers"].as_array_mut().unwrap() {
            answer["ids"] = json!(ids);
        }
        let said: String = kept.iter().map(|line| format!("{line}\n")).collect();
        fixture.tool.file("state/answers.jsonl", &said);
        let mut lines = fixture.tool.run(&arguments, &rows).exits(0).records();
        let corpus = lines.pop().unwrap()["corpus"].take();
        for line in &lines {
            assert_eq!(line["systems"]["base"]["prediction"], typed);
        }
        (lines, corpus)
    };
    let bleu = |line: &Value| line["systems"]["base"]["bleu"].as_f64().unwrap();
    let is_whole = |line: &Value| {
        let of = &line["systems"]["base"];
        [
            ("rouge1", 1.0),
            ("rougeL", 1.0),
            ("bleu", 100.0),
            ("chrf", 100.0),
        ]
        .iter()
        .all(|(figure, most)| (of[figure].as_f64().unwrap() - most).abs() < 1e-9)
    };

    let (lines, corpus) = figures(&[&pair], "--text=normalized");
    assert_eq!(lines[0]["reference"], normal);
    assert!(
        is_whole(&lines[0]) && is_whole(&corpus),
        "{} {corpus}",
        lines[0]
    );
    assert!(
        corpus["signature"]
            .as_str()
            .unwrap()
            .contains("|scored:normalized|")
    );

    // As it was collected, and as nobody normalised it.
    let (lines, corpus) = figures(&[&pair], "--text=raw");
    assert!(is_whole(&lines[0]), "{}", lines[0]);
    assert!(
        corpus["signature"]
            .as_str()
            .unwrap()
            .contains("|scored:raw|")
    );
    let (lines, corpus) = figures(&[&prompt, &pair], "--text=normalized");
    assert!(bleu(&lines[0]) < 50.0 && is_whole(&lines[1]), "{lines:?}");
    assert!(
        corpus["signature"]
            .as_str()
            .unwrap()
            .contains("|scored:normalized+raw|")
    );

    let flat = format!("{}\n", json!({"prediction": typed, "reference": normal}));
    let flat = fixture
        .tool
        .run(&["--score-only"], &flat)
        .exits(0)
        .records();
    assert_eq!(flat[0]["bleu"], bleu(&lines[0]));
}

/// Training notes its base as it was given, the adapter as it is found from everywhere.
#[test]
fn a_relative_base_is_found_from_another_folder() {
    let fixture = Fixture::new();
    let trained = "model: {path: model, quantization: none}\n";
    fixture.tool.file("run1/train.yaml", trained);
    let whole = fixture.folder("model").display().to_string();
    let config = fixture.tool.read("run1/adapter_config.json");
    let config = config.replace(r#""model""#, &json!(whole).to_string());
    fixture.tool.file("run1/adapter_config.json", &config);
    std::fs::create_dir(fixture.folder("elsewhere")).unwrap();
    let arguments = ["--adapter=../run1", "--max-new-tokens=2"];
    let mut command = fixture.tool.command(&arguments);
    command.current_dir(fixture.folder("elsewhere"));
    let run = Run::of(&mut command, fixture.pairs().as_bytes()).exits(0);
    assert_eq!(run.records().len(), 5);
}

/// A base that was given to qlora-train by its name on the hub is found by it.
#[test]
fn a_downloaded_base_goes_by_its_name() {
    let fixture = Fixture::new();
    let cache = fixture.folder("data/cache/models/someone");
    std::fs::create_dir_all(&cache).unwrap();
    std::fs::rename(fixture.folder("model"), cache.join("tiny")).unwrap();
    let trained = "model: {path: someone/tiny, quantization: none}\n";
    fixture.tool.file("run1/train.yaml", trained);
    let arguments = [
        "--adapter=run1",
        "--max-new-tokens=2",
        "--prompted-examples=0",
    ];
    let run = fixture.tool.run(&arguments, &fixture.pairs()).exits(0);
    assert_eq!(run.records().len(), 5);
}

/// A base that nobody downloaded yet is, by the name that the adapter has for it; in
/// tests/qlora-train-hub.rs the network behaves worse.
#[test]
fn a_base_is_downloaded_by_the_name_that_the_adapter_has_for_it() {
    let fixture = Fixture::new();
    let served = fixture.folder("model");
    let files: HashMap<String, Vec<u8>> = std::fs::read_dir(&served)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let bytes = std::fs::read(entry.path()).unwrap();
            (entry.file_name().into_string().unwrap(), bytes)
        })
        .collect();
    let here = fixture.run(&["--adapter=run1"]).exits(0).stdout;
    let siblings: Vec<Value> = files
        .iter()
        .map(|(name, bytes)| json!({ "rfilename": name, "size": bytes.len() }))
        .collect();
    let hub = Server::start(move |request, before| {
        if request.path == "/api/models/demo/tiny/revision/v1" {
            return match before {
                0 => Reply::text(503, "not now"),
                _ => Reply::json(200, &json!({ "sha": "c0ffee", "siblings": siblings })),
            };
        }
        match request.path.strip_prefix("/demo/tiny/resolve/c0ffee/") {
            Some(name) => Reply::bytes(200, &files[name]),
            None => Reply::text(404, "no"),
        }
    });
    std::fs::remove_dir_all(&served).unwrap();
    let named = fixture
        .tool
        .read("run1/adapter_config.json")
        .replace(r#""model""#, r#""demo/tiny@v1""#);
    fixture.tool.file("run1/adapter_config.json", &named);
    let Fixture { tool, config } = fixture;
    let fixture = Fixture {
        tool: tool.env("HF_ENDPOINT", &hub.url()),
        config,
    };
    let arguments = [
        "--adapter=run1",
        "--quantization=none",
        "--max-new-tokens=12",
    ];
    let run = |says: &str| {
        let run = fixture.tool.run(&arguments, &fixture.pairs()).exits(0);
        run.says(says).stdout
    };
    let fetched = run("HTTP 503: not now; attempt 1 of 3, the next in ");
    assert_eq!(fetched, here);
    let asked = hub.requests().len();
    assert_eq!(run("computing on"), here);
    assert_eq!(hub.requests().len(), asked, "it was here already");

    let with = |model: &str| fixture.tool.run(&["--model", model], "");
    with("demo/other")
        .exits(4)
        .says("neither a model in a folder demo/other nor one of that name on http://127.0.0.1");
    assert_eq!(hub.requests().len(), asked + 1, "a 404 is final");
    with("a/b/c").exits(2).says("no model in a/b/c");
}

/// Forty items, so that there are blocks to be interrupted between.
fn many(fixture: &Fixture) -> String {
    let pairs = fixture
        .pairs()
        .replace(r#""split":"train","#, "")
        .replace(r#""split":"eval","#, "");
    (0..6)
        .flat_map(|round| {
            let numbered =
                move |line: &str| line.replacen(r#""id":"p"#, &format!(r#""id":"{round}p"#), 1);
            pairs.lines().map(numbered).collect::<Vec<_>>()
        })
        .map(|line| line + "\n")
        .collect()
}

#[test]
fn killed_at_any_moment_it_goes_on_to_the_same_bytes() {
    let fixture = Fixture::new();
    fixture.tool.file("many.jsonl", &many(&fixture));
    let plain = [
        "--model=model",
        "--adapter=run1",
        "--quantization=none",
        "--max-new-tokens=40",
        "--temperature=1.1",
        "--batch-size=1",
    ];
    let whole = fixture.tool.run(&plain, &many(&fixture)).exits(0).stdout;
    let arguments = [&plain[..], &["--state=state"]].concat();
    let journal = fixture.folder("state/answers.jsonl");
    let lines = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());

    // A random number of blocks, and then a random moment of the next.
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    println!("seed {seed}");
    let mut state = u64::from(seed) | 1;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut kills = 0;
    for _ in 0..4 {
        let until = lines() + 1 + random(4) as usize;
        let mut child = fixture
            .tool
            .command(&arguments)
            .stdin(std::fs::File::open(fixture.folder("many.jsonl")).unwrap())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        while lines() < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(random(5_000)));
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(kills > 0, "it was done before it could be killed");
    // As a crash in the middle of writing would leave it, within a character even.
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes.extend(b"{\"first\":0,\"system\":\"\xc3");
    std::fs::write(&journal, bytes).unwrap();

    let resumed = fixture.tool.run(&arguments, &many(&fixture)).exits(0);
    assert_eq!(resumed.stdout, whole);
    resumed
        .says("going on: ")
        .says("replies are in state/answers.jsonl already");
    let done = std::fs::read(&journal).unwrap();
    let again = fixture.tool.run(&arguments, &many(&fixture)).exits(0);
    assert_eq!(again.stdout, whole);
    again.says("going on: 84 replies");
    assert_eq!(
        std::fs::read(&journal).unwrap(),
        done,
        "nothing was left to do"
    );
}

#[test]
fn a_signal_ends_it_with_the_block_in_hand_kept() {
    let fixture = Fixture::new();
    let rows = many(&fixture);
    let plain = [
        "--model=model",
        "--adapter=run1",
        "--quantization=none",
        "--max-new-tokens=100",
        "--temperature=1.1",
        "--batch-size=1",
    ];
    let whole = fixture.tool.run(&plain, &rows).exits(0).stdout;
    for signal in ["-INT", "-TERM", "-HUP", "-USR1"] {
        let state = format!("state{signal}");
        let arguments = [&plain[..], &["--state", &state]].concat();
        let journal = fixture.folder(&state).join("answers.jsonl");
        let lines = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
        // The line that says whose replies they are, and a block of four.
        let run = fixture
            .tool
            .signal(signal, &arguments, &rows, || lines() >= 2);
        let run = run.says(&format!(" of 84 replies are kept in {state}/answers.jsonl"));
        if signal == "-USR1" {
            assert_eq!(run.exits(0).stdout, whole);
            continue;
        }
        let run = run
            .exits(130)
            .says("interrupted; ")
            .says("the same command goes on");
        let kept = lines() - 1;
        assert!((1..21).contains(&kept), "{kept} blocks\n{run}");
        run.says(&format!("interrupted; {} of", 4 * kept));
        let again = fixture.tool.run(&arguments, &rows).exits(0);
        assert_eq!(again.stdout, whole);
        again.says(&format!("going on: {} replies", 4 * kept));
    }
}

#[test]
fn nothing_held_out_is_told_with_the_remedy() {
    let fixture = Fixture::new();
    let run = |rows: &str| {
        let arguments = ["--model=model", "--quantization=none", "--max-new-tokens=2"];
        fixture.tool.run(&arguments, rows).exits(0)
    };
    let trained = fixture.pairs().replace(r#""eval""#, r#""train""#);
    let none = run(&trained)
        .says("warning: no row is held out")
        .says("of 7 read, 7 have `split: train` and none `split: eval`")
        .says("deduplication.eval_fraction");
    assert_eq!(none.stdout, "");
    assert_eq!(
        run("").says("warning: no rows on standard input").stdout,
        ""
    );

    let row = |said: &str| json!({"prompt": "Tea?", "completion": said}).to_string() + "\n";
    run(&(row("Always.") + &row(" ") + &row("")))
        .says("warning: an empty reply, to which nothing can be near, is in 2 of 3 held-out rows")
        .says("(the first: line 2)");
    run(&row("Always.")).never_says("empty reply");
}

#[test]
fn kept_replies_of_another_run_are_refused() {
    let fixture = Fixture::new();
    let run = |more: &[&str]| fixture.run(&[&["--adapter=run1", "--state=state"], more].concat());
    run(&[]).exits(0);
    let kept = fixture.tool.read("state/answers.jsonl");
    let refused = run(&["--seed=7", "--temperature=0.5"]).exits(2);
    assert_eq!(refused.stdout, "");
    refused
        .says("generation.seed (was 42, is 7)")
        .says("generation.temperature (was 0.0, is 0.5)")
        .says("delete state to begin anew")
        .never_says("generation.top_p");
    run(&["--adapter=other=run2"])
        .exits(2)
        .says("adapter other (was not there, is ");
    let fewer: String = fixture
        .pairs()
        .lines()
        .take(4)
        .map(|line| format!("{line}\n"))
        .collect();
    let arguments = [
        "--model=model",
        "--quantization=none",
        "--max-new-tokens=12",
        "--adapter=run1",
        "--state=state",
    ];
    fixture
        .tool
        .run(&arguments, &fewer)
        .exits(2)
        .says("items (was ");
    fixture.adapter("run1", 9);
    run(&[]).exits(2).says("adapter lora (was ");
    assert_eq!(fixture.tool.read("state/answers.jsonl"), kept);

    fixture.tool.file("state/answers.jsonl", "{\"v\":1}\n");
    run(&[])
        .exits(3)
        .says("state/answers.jsonl:1: no kept answers");
}

#[test]
fn several_adapters_stand_side_by_side() {
    let fixture = Fixture::new();
    let both = fixture
        .run(&[
            "--adapter=b=run2",
            "--adapter=a=run1",
            "--prompted-examples=1",
        ])
        .exits(0)
        .records();
    let alone = fixture.run(&["--adapter=a=run1"]).exits(0).records();
    let names: Vec<_> = both[0]["systems"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    // The first two are what judge compares where nothing is said.
    assert_eq!(names, ["base", "b", "a", "prompted"]);
    for (both, alone) in both.iter().zip(&alone).take(4) {
        assert_eq!(both["systems"]["a"], alone["systems"]["a"]);
    }
}

#[test]
fn what_does_not_fit_together_is_named() {
    let fixture = Fixture::new();
    fixture
        .run(&["--adapter=nowhere"])
        .exits(2)
        .says("--adapter lora=nowhere");
    std::fs::create_dir_all(fixture.folder("begun/checkpoints")).unwrap();
    fixture.run(&["--adapter=begun"]).exits(2).says("--resume");
    // Finished, whatever else is missing.
    let weights = fixture.folder("run1/adapter_model.safetensors");
    std::fs::create_dir_all(fixture.folder("bare/checkpoints")).unwrap();
    std::fs::copy(&weights, fixture.folder("bare/adapter_model.safetensors")).unwrap();
    fixture
        .run(&["--adapter=bare"])
        .exits(2)
        .says("--adapter lora=bare: adapter_config.json is missing there")
        .never_says("not finished");
    std::fs::copy(&weights, fixture.folder("run2/adapter_model.bin")).unwrap();
    std::fs::rename(fixture.folder("run2/adapter_model.safetensors"), &weights).unwrap();
    fixture
        .run(&["--adapter=run2"])
        .exits(2)
        .says("adapter_model.safetensors is missing; adapter_model.bin is a pickle");
    std::fs::rename(&weights, fixture.folder("run2/adapter_model.safetensors")).unwrap();
    std::fs::rename(fixture.folder("bare/adapter_model.safetensors"), &weights).unwrap();
    fixture
        .run(&["--adapter=base=run1"])
        .exits(2)
        .says("`base` is the name of the model");
    fixture
        .run(&["--adapter=run1", "--adapter=run2"])
        .exits(2)
        .says("two adapters are called lora");
    fixture
        .run(&["--temperature=-1"])
        .exits(2)
        .says("generation.temperature");
    fixture.run(&["--max-new-tokens=0"]).exits(2);
    fixture
        .run(&["--max-bad-lines=1"])
        .exits(2)
        .says("--rejects");
    let nameless = fixture
        .tool
        .read("run2/adapter_config.json")
        .replace(r#""model""#, "null");
    fixture.tool.file("nameless/adapter_config.json", &nameless);
    fixture
        .tool
        .file("nameless/adapter_model.safetensors", "not read yet");
    fixture
        .tool
        .run(&["--adapter=nameless"], "")
        .exits(2)
        .says("--model is needed");
    fixture
        .tool
        .run(&["--model=nowhere"], "")
        .exits(2)
        .says("no model in nowhere");
    fixture
        .tool
        .run(&["--score-only", "--model=model"], "")
        .exits(2);

    let wide = Lora::random(
        &Config {
            hidden_size: 32,
            ..fixture.config.clone()
        },
        &TARGETS,
        2,
        3.0,
        0.2,
        DType::F32,
        1,
    );
    save(
        &fixture.folder("run2/adapter_model.safetensors"),
        wide.unwrap().tensors,
    );
    fixture
        .run(&["--adapter=run2"])
        .exits(4)
        .says("does not go with the base model")
        .says("lora_A.weight")
        .says("shape");

    let long = fixture
        .pairs()
        .replace("Then the cat wrote", &"and the cat wrote ".repeat(40));
    fixture
        .tool
        .run(&["--model=model"], &long)
        .exits(3)
        .says("-:2: ")
        .says("more than the model's 192");
    let spells = fixture
        .pairs()
        .replace("Bread is just", "Bread <|im_end|> is");
    fixture
        .tool
        .run(&["--model=model", "--max-new-tokens=2"], &spells)
        .exits(0)
        .says("pair p4")
        .says("<|im_end|>");
}

/// What trains into a folder of any name is evaluated from there.
#[test]
fn the_folder_of_an_adapter_need_be_no_utf8() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let fixture = Fixture::new();
    let same = fixture.run(&["--adapter=run1"]).exits(0);
    let odd = OsStr::from_bytes(b"run\xff=\xfe");
    let folder = fixture.tool.folder();
    std::fs::rename(folder.join("run1"), folder.join(odd)).unwrap();
    let mut named = OsString::from("--adapter=lora=");
    named.push(odd);
    let mut arguments: Vec<OsString> = ["--model=model", "--quantization=none"]
        .map(Into::into)
        .into();
    arguments.extend(["--max-new-tokens=12".into(), named]);
    let run = fixture.tool.run(&arguments, &fixture.pairs()).exits(0);
    assert_eq!(run.stdout, same.stdout);
}

/// The weights differ, the shape does not: nothing else would tell.
#[test]
fn an_adapter_of_another_base_is_refused() {
    let fixture = Fixture::new();
    let of_a_run = |model: &str| {
        let run =
            json!({ "v": 1, "version": "0.1.0", "settings": [], "data": "0", "model": model });
        fixture.tool.file("run1/run.json", &run.to_string());
    };
    let base = Checkpoint::open(&fixture.folder("model")).unwrap();
    of_a_run(&base.fingerprint().unwrap());
    let same = fixture
        .run(&["--adapter=run1"])
        .exits(0)
        .never_says("other files");

    of_a_run(&"ab".repeat(32));
    let other = fixture.run(&["--adapter=run1"]).exits(2);
    assert!(other.stdout.is_empty(), "{other}");
    other
        .says("run1 was trained on other files than those of the base model")
        .says("abababababab")
        .says("4-bit")
        .says("--any-base");
    let anyway = fixture
        .run(&["--adapter=run1", "--any-base"])
        .exits(0)
        .says("warning: adapter lora: run1 was trained on other files");
    assert_eq!(anyway.stdout, same.stdout);
}

#[test]
fn a_damaged_adapter_says_what_to_do() {
    let fixture = Fixture::new();
    let weights = fixture.folder("run1/adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for damaged in [&whole[..whole.len() / 2], b""] {
        std::fs::write(&weights, damaged).unwrap();
        fixture
            .run(&["--adapter=run1"])
            .exits(4)
            .says("--adapter lora=run1 is damaged")
            .says("RUN=new")
            .says("run1/adapter_model.safetensors");
    }
}

/// Without sides in the rows, what an adapter saw in training decides.
#[test]
fn rows_that_were_trained_on_are_left_out() {
    let fixture = Fixture::new();
    let unsplit = (fixture.pairs())
        .replace(r#""split":"train","#, "")
        .replace(r#""split":"eval","#, "");
    let wording = Wording {
        normalized: true,
        system_prompt: String::new(),
        prompt: PromptTemplate::new("{{ tweet }}").unwrap(),
    };
    let rows: Vec<String> = (unsplit.lines())
        .map(|line| wording.read(&Record::parse(line).unwrap()).unwrap().row)
        .collect();
    let saw = |folder: &str, train: &[usize], eval: &[usize]| {
        let mut seen = Seen::default();
        for (side, rows_of) in [(Split::Train, train), (Split::Eval, eval)] {
            rows_of.iter().for_each(|&i| seen.add(&rows[i], side));
        }
        fixture
            .tool
            .file(&format!("{folder}/rows.jsonl"), &seen.to_lines());
    };
    let ids = |run: &Run| -> Vec<String> {
        let records = run.records();
        let ids = records.iter().filter_map(|line| line["id"].as_str());
        ids.map(str::to_owned).collect()
    };
    let run = |adapters: &[&str], input: &str| {
        let base = ["--model=model", "--max-new-tokens=2"];
        fixture.tool.run(&[&base[..], adapters].concat(), input)
    };

    let unknown = run(&["--adapter=run1"], &unsplit).exits(0);
    let unknown = unknown.says("adapter lora has no rows.jsonl beside it: whether it was trained on some of the 7 rows is not known");
    assert_eq!(ids(&unknown).len(), 7);

    saw("run1", &[0, 1, 2, 3], &[4, 5]);
    let one = run(&["--adapter=run1"], &unsplit).exits(0).says(
        "of 7 rows, 4 that were trained on are left out and 3 taken (1 of them, by their texts, not in rows.jsonl)",
    );
    assert_eq!(ids(&one), ["p4", "p5", "p6"]);

    // As they were before pair-dedup.
    let raw: String = (unsplit.lines())
        .map(|line| {
            let mut record = Record::parse(line).unwrap();
            assert!(record.remove("tweet_normalized") && record.remove("reply_normalized"));
            format!("{record}\n")
        })
        .collect();
    let raw = run(&["--adapter=run1", "--text=raw"], &raw).exits(0);
    assert_eq!(ids(&raw), ["p4", "p5", "p6"]);

    // Where it began from an adapter that tells nothing, the others may be known to it.
    let mut partly = Seen::unknown();
    partly.add(&rows[0], Split::Train);
    fixture.tool.file("run2/rows.jsonl", &partly.to_lines());
    let partly = run(&["--adapter=run2"], &unsplit)
        .exits(0)
        .says("rows.jsonl beside adapter lora has a gap")
        .says("whether it was trained on others of the 7 rows is not known");
    assert_eq!(ids(&partly).len(), 6);

    saw("run2", &[4, 6], &[5, 0]);
    let both = ["--adapter=a=run1", "--adapter=b=run2"];
    let held_out = run(&both, &unsplit).exits(0);
    assert_eq!(ids(&held_out), ["p5"]);

    // What an adapter says of its training holds, whatever the rows say of themselves.
    let sided = |split: &str| unsplit.replace("\"v\":1", &format!("\"split\":\"{split}\",\"v\":1"));
    let eval = sided("eval");
    let left_out = run(&both, &eval)
        .exits(0)
        .says("warning: adapter a was trained on 4 of the 7 rows of `split: eval`, by rows.jsonl beside it: left out")
        .says("warning: adapter b was trained on 2 of the 7 rows of `split: eval`")
        .says("left out for (a row may have several): trained_on 6; --rejects FILE keeps the rows")
        .says("in 7, out 1, rejected 6");
    assert_eq!(ids(&left_out), ["p5"]);

    // Each goes where it was asked for, with the reason, and everything else is there.
    let train = sided("train");
    let mut mixed: Vec<&str> = eval.lines().take(3).collect();
    mixed.extend(train.lines().skip(3).take(3));
    mixed.extend(unsplit.lines().skip(6));
    let rejects = ["--adapter=a=run1", "--adapter=b=run2", "--rejects=rejects"];
    saw("run2", &[1], &[]);
    saw("run1", &[1, 2, 3], &[]);
    let kept = run(&rejects, &mixed.join("\n"))
        .exits(0)
        .says("in 7, out 1, rejected 3")
        .never_says("--rejects");
    assert_eq!(ids(&kept), ["p0"]);
    let rejected = fixture.tool.read("rejects");
    let rejected: Vec<Value> = (rejected.lines())
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let was = |id: &str| rejected.iter().find(|row| row["id"] == id).unwrap();
    let why = |id: &str| -> Vec<(String, String)> {
        assert_eq!(was(id)["rejected"]["by"], "gen-eval");
        let reasons = was(id)["rejected"]["reasons"].as_array().unwrap();
        let text = |reason: &Value, key: &str| reason[key].as_str().unwrap().to_owned();
        let why = reasons
            .iter()
            .map(|r| (text(r, "filter"), text(r, "detail")));
        why.collect()
    };
    let by = |name: &str| {
        let detail = format!("adapter {name} was, by its texts in rows.jsonl");
        ("trained_on".to_owned(), detail)
    };
    assert_eq!(rejected.len(), 3);
    assert_eq!(why("p1"), [by("a"), by("b")]);
    assert_eq!(why("p2"), [by("a")]);
    assert_eq!(why("p6")[0].0, "no_split");
    let mut whole = was("p1").clone();
    whole.as_object_mut().unwrap().remove("rejected");
    assert_eq!(whole, serde_json::from_str::<Value>(mixed[1]).unwrap());

    saw("run1", &[0, 1, 2, 3, 4, 5, 6], &[]);
    let none = run(&["--adapter=run1"], &unsplit).exits(0);
    assert_eq!(none.stdout, "");
    none.says("each of the 7 rows was trained on")
        .says("data.eval_fraction")
        .says("trained_on 7; --rejects FILE");
    let none = run(&["--adapter=run1"], &eval).exits(0);
    assert_eq!(none.stdout, "");
    none.says("each of the 7 rows of `split: eval` was trained on, so nothing is generated");

    fixture.tool.file("run1/rows.jsonl", "");
    let other = run(&["--adapter=run1"], &unsplit).exits(0);
    let other = other.says("by its texts none of the 7 rows is in rows.jsonl beside adapter lora");
    assert_eq!(ids(&other).len(), 7);
    let sums = format!("{:064}  rows.jsonl\n", 0);
    let mut lines = String::new();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let sum = cli::sha256_file(&fixture.folder("run1").join(name)).unwrap();
        lines += &format!("{sum}  {name}\n");
    }
    fixture.tool.file("run1/SHA256SUMS", &(lines + &sums));
    run(&["--adapter=run1"], &unsplit)
        .exits(4)
        .says("--adapter lora=run1: run1/rows.jsonl: is not as it was written")
        .says("put it back");
    std::fs::remove_file(fixture.folder("run1/rows.jsonl")).unwrap();
    run(&["--adapter=run1"], &unsplit)
        .exits(4)
        .says("--adapter lora=run1: run1/rows.jsonl: is missing, and SHA256SUMS names it");
}

/// A model that computes no numbers replies all the same, and its figures would be null.
#[test]
fn what_is_no_number_is_no_figure() {
    let fixture = Fixture::new();
    let spoil = |file: &str, name: &str, value: f32| {
        let path = fixture.folder(file);
        let mut tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
        let tensor = &tensors[name];
        let spoilt = tensor.ones_like().unwrap().to_dtype(DType::F32).unwrap();
        let spoilt = (spoilt * f64::from(value)).unwrap();
        let spoilt = spoilt.to_dtype(tensor.dtype()).unwrap();
        tensors.insert(name.into(), spoilt);
        candle_core::safetensors::save(&tensors, &path).unwrap();
    };
    let weights = "adapter_model.safetensors";
    let b = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight";
    spoil(&format!("run1/{weights}"), b, f32::NAN);
    let nan = fixture.run(&["--adapter=run1"]).exits(4);
    assert_eq!(nan.stdout, "");
    nan.says("--adapter lora=run1 is damaged").says(b);

    // Numbers, but beyond what the product can hold.
    spoil(&format!("run2/{weights}"), b, 3e38);
    let much = fixture.run(&["--adapter=run2"]).exits(4);
    much.says("system lora: the loss of ")
        .says("its values or its scale")
        .says("too large");

    spoil(
        "model/model.safetensors",
        "model.layers.0.self_attn.q_norm.weight",
        f32::NAN,
    );
    let base = fixture
        .tool
        .run(&["--model=model", "--state=kept"], &fixture.pairs());
    let base = base.exits(4);
    assert_eq!(base.stdout, "");
    base.says("system base: the loss of p")
        .says("`qlora-train inspect 'model'` says which");
    assert_eq!(fixture.tool.read("kept/answers.jsonl").lines().count(), 1);
}

#[test]
fn every_example_of_the_help_runs() {
    harness::check_examples(&Fixture::new().tool);
}

#[test]
fn a_gpu_scores_and_answers_as_the_processor_does() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model");
    let model = model.display().to_string();
    let pairs: String = (0..3)
        .map(|i| {
            let (id, tweet) = (
                format!("p{i}"),
                format!("Day {i}: thinking about tea again."),
            );
            let pair =
                json!({ "id": id, "tweet": tweet, "reply": "I like tea too.", "split": "eval" });
            format!("{pair}\n")
        })
        .collect();
    let run = |device: &str| {
        let how = [
            "--text=raw",
            "--quantization=nf4",
            "--temperature=0",
            "--max-new-tokens=4",
        ];
        let arguments = [&["--model", &model, "--device", device], &how[..]].concat();
        tool.run(&arguments, &pairs).exits(0)
    };
    let (cpu, cuda) = (run("cpu"), run("cuda:0"));
    let cuda = cuda.says("the weights of 5 of 5 layers lie decoded as well");
    let answers = cpu.records().into_iter().zip(cuda.records()).take(3);
    for (cpu, cuda) in answers {
        let [cpu, cuda] = [cpu, cuda].map(|line| line["systems"]["base"].clone());
        assert_eq!(cpu["prediction"], cuda["prediction"]);
        let [cpu, cuda] = [cpu, cuda].map(|base| base["nll"].as_f64().unwrap());
        // bf16 against f32; measured on 2026-11-24 over twelve such rows: 2.0e-2 of 11.6.
        assert!((cpu - cuda).abs() < 5e-2, "{cpu} {cuda}");
    }
}

#[test]
fn a_gpu_without_room_tells_what_needs_less() {
    let tool = (tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":")))
        .env("CUDA_STAND_IN", "filling");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model");
    let model = model.display().to_string();
    let run = |rows: &str| {
        let run = tool
            .run(&["--model", &model, "--device=cuda:0"], rows)
            .exits(4);
        run.says("out of memory: no room for")
    };
    let [eval, train] = ["eval", "train"].map(|split| {
        format!(r#"{{"prompt":"Tea?","completion":"Always.","split":"{split}"}}"#) + "\n"
    });
    run(&eval).says("; what would help: a lower --batch-size (now 16), ending what else");
    run(&(eval + &train)).says(" (now 16), fewer --prompted-examples (now 8), ending what else");
}
