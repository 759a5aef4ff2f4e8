//! Models by their name on the hub, from a local server that behaves as badly as
//! the network does.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use harness::Tool;
use harness::server::{Reply, Request, Server};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";
const FOLDER: &str = "data/cache/models/demo/tiny";

/// Where most models name their licence.
const README: &[u8] = b"---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# Tiny\n";

/// The demo's model as a repository, with files in it that nobody here wants.
fn files() -> Arc<BTreeMap<String, Vec<u8>>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model");
    let names = [
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "NOTICE",
    ];
    let mut files: BTreeMap<String, Vec<u8>> = names
        .iter()
        .map(|name| (name.to_string(), fs::read(folder.join(name)).unwrap()))
        .collect();
    files.insert("README.md".into(), README.into());
    files.insert("LICENSE".into(), b"Apache License\n".to_vec());
    for name in [
        "pytorch_model.bin",
        ".gitattributes",
        "onnx/model.safetensors",
    ] {
        files.insert(name.into(), b"not wanted".to_vec());
    }
    Arc::new(files)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// What `git hash-object` says of the small files.
const BLOBS: [(&str, &str); 8] = [
    ("LICENSE", "ce3b7affaed22edd5210fe08a3ff8c1e917cf201"),
    ("README.md", "3c997337f3eb6392481ba28e78b81c9aee60c714"),
    ("NOTICE", "b64dcfc439367a4cd0bc530655b13f7148572f5b"),
    (
        "chat_template.jinja",
        "699ff8df401fe4788525e9c1f9b86a99eadd6230",
    ),
    ("config.json", "d6f61f2bf06befb3be8ac7762eeea88e1e694afa"),
    (
        "generation_config.json",
        "ef80dfd1df6a66db314a8f2d61b6f299e390ecad",
    ),
    ("tokenizer.json", "d741cdec6c304a4bb19fe528a94aebd1cb2b59e4"),
    (
        "tokenizer_config.json",
        "8338c6124c1f03d2d926186250c64a8e5b219ca8",
    ),
];

/// What the hub says of the repository; large files carry their hash, and the id of
/// the pointer that git has in their place.
fn revision(files: &BTreeMap<String, Vec<u8>>) -> Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let blob = BLOBS.iter().find(|(small, _)| small == name);
        let blob = blob.map_or("0123", |(_, id)| id);
        let mut file = json!({"rfilename": name, "size": bytes.len(), "blobId": blob});
        if name.ends_with(".safetensors") {
            file["lfs"] = json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134});
        }
        file
    };
    json!({"id": "demo/tiny", "sha": COMMIT, "siblings": files.iter().map(sibling).collect::<Vec<_>>()})
}

/// The file from where it was asked for.
fn ranged(bytes: &[u8], request: &Request) -> Reply {
    let from = request.header("range").map(|range| {
        range
            .strip_prefix("bytes=")
            .unwrap()
            .strip_suffix('-')
            .unwrap()
            .parse::<usize>()
            .unwrap()
    });
    match from {
        None => Reply::bytes(200, bytes),
        Some(from) => Reply::bytes(206, &bytes[from..]).header(
            "content-range",
            &format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()),
        ),
    }
}

/// The store that the hub's redirects lead to.
fn store(answer: impl Fn(Reply, usize) -> Reply + Send + Sync + 'static) -> Server {
    let files = files();
    Server::start(move |request, before| {
        let name = request.path.strip_prefix("/blob/").unwrap();
        answer(ranged(&files[name], request), before)
    })
}

/// The hub: weights lie in the store.
fn hub(store: &Server) -> Server {
    hub_of(files(), store)
}

/// The hub, whose small files are these, whatever it says of them.
fn hub_of(sent: Arc<BTreeMap<String, Vec<u8>>>, store: &Server) -> Server {
    let (files, store) = (files(), store.url());
    Server::start(move |request, _| {
        if request.path.starts_with("/api/models/demo/tiny/revision/") {
            return Reply::json(200, &revision(&files));
        }
        let prefix = format!("/demo/tiny/resolve/{COMMIT}/");
        let Some(name) = request.path.strip_prefix(&prefix) else {
            return Reply::json(404, &json!({"error": "Repository not found"}));
        };
        match name {
            WEIGHTS => Reply::text(302, "")
                .header("location", &format!("{store}/blob/{name}?signature=abc")),
            name => ranged(&sent[name], request),
        }
    })
}

fn tool(hub: &Server) -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_qlora-train"))
        .env("HF_ENDPOINT", &hub.url())
        .env("HF_ENDPOINT_TOKEN", "hf_secret")
        .env("HF_TOKEN", "hf_of_another_host")
        .env("HF_HUB_CACHE", "hf/hub")
}

const FETCH: [&str; 4] = ["--model", "demo/tiny", "--save-quantized", "four"];

#[track_caller]
fn is_whole(tool: &Tool) {
    let folder = tool.folder().join(FOLDER);
    let files = files();
    let mut found: Vec<String> = fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    found.sort();
    let wanted = |name: &&String| {
        ![".gitattributes", "pytorch_model.bin"].contains(&name.as_str()) && !name.contains('/')
    };
    assert!(found.iter().eq(files.keys().filter(wanted)), "{found:?}");
    for name in found {
        assert!(
            fs::read(folder.join(&name)).unwrap() == files[&name],
            "{name}"
        );
    }
}

#[test]
fn a_model_is_fetched_once_and_the_token_stays_with_the_hub() {
    // The connection breaks twice in the middle of the weights.
    let store = store(|reply, before| {
        if before < 2 {
            reply.cut_after(1_000_000)
        } else {
            reply
        }
    });
    let hub = hub(&store);
    let tool = tool(&hub);
    let run = tool
        .run(&FETCH, "")
        .exits(0)
        .says("downloading demo/tiny at 0123456789ab");
    assert!(!run.stderr.contains("hf_secret"), "{run}");
    is_whole(&tool);
    assert!(tool.folder().join("four/model.safetensors").exists());
    let ranges: Vec<_> = store
        .requests()
        .iter()
        .map(|r| r.header("range").map(str::to_owned))
        .collect();
    assert_eq!(ranges[..2], [None, Some("bytes=1000000-".to_owned())]);
    assert!(
        store
            .requests()
            .iter()
            .all(|r| r.header("authorization").is_none())
    );
    let asked = hub.requests();
    assert!(
        asked
            .iter()
            .all(|r| r.header("authorization") == Some("Bearer hf_secret"))
    );
    assert_eq!(asked[0].query("blobs"), Some("true"));
    // The token of huggingface.co, which the environment has as well, goes to no mirror.
    let without = self::tool(&hub).env("HF_ENDPOINT_TOKEN", "");
    without.run(&FETCH, "").exits(0);
    let later = hub.requests().split_off(asked.len());
    assert!(!later.is_empty() && later.iter().all(|r| r.header("authorization").is_none()));
    let asked = hub.requests();

    let second = ["--model", "demo/tiny", "--save-quantized", "again"];
    tool.run(&second, "").exits(0);
    assert_eq!(hub.requests().len(), asked.len(), "it was here already");
    let inspected = tool.run(&["inspect", FOLDER, "--strict"], "").exits(0);
    assert!(inspected.stdout.contains("no problems"), "{inspected}");
}

/// What "delete it" says, followed as someone may: one file, all that `*` names, all.
#[test]
fn what_was_deleted_or_cut_short_is_fetched_again() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    let folder = tool.folder().join(FOLDER);
    tool.run(&FETCH, "").exits(0);
    let cut = |name: &str| {
        let file = fs::File::options().write(true).open(folder.join(name));
        file.unwrap().set_len(1000).unwrap();
    };
    let damages: [(&str, &dyn Fn()); 5] = [
        ("weights", &|| {
            fs::remove_file(folder.join(WEIGHTS)).unwrap()
        }),
        ("cut weights", &|| cut(WEIGHTS)),
        ("cut tokens", &|| cut("tokenizer.json")),
        ("all but hidden files", &|| {
            for entry in fs::read_dir(&folder).unwrap().flatten() {
                if !entry.file_name().to_string_lossy().starts_with('.') {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
        }),
        ("the folder", &|| fs::remove_dir_all(&folder).unwrap()),
    ];
    for (out, damage) in damages {
        let asked = hub.requests().len();
        damage();
        tool.run(&["--model", "demo/tiny", "--save-quantized", out], "")
            .exits(0)
            .says("downloading demo/tiny at 0123456789ab");
        is_whole(&tool);
        assert!(tool.folder().join(out).join(WEIGHTS).exists(), "{out}");
        let at = &hub.requests()[asked].path;
        assert_eq!(at.ends_with(COMMIT), out != "the folder", "{at}");
    }
    // A download of an earlier version noted no files.
    let state = json!({"model": "demo/tiny", "commit": COMMIT, "complete": true});
    fs::write(folder.join(".hub.json"), state.to_string()).unwrap();
    let asked = hub.requests().len();
    tool.run(&["--model", "demo/tiny", "--save-quantized", "old"], "")
        .exits(0);
    assert_eq!(hub.requests().len(), asked);
    fs::remove_file(folder.join(WEIGHTS)).unwrap();
    tool.run(&["--model", "demo/tiny", "--save-quantized", "new"], "")
        .exits(0);
    is_whole(&tool);
}

/// The advice to a run on a downloaded base that was damaged later, followed.
#[test]
fn a_damaged_download_is_named_and_comes_again_as_advised() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    tool.run(&FETCH, "").exits(0);
    // The last value of the last tensor, in BF16.
    let weights = tool.folder().join(FOLDER).join(WEIGHTS);
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len() - 2;
    bytes[end..].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let row = json!({"prompt": "Good morning", "completion": "And to you"});
    tool.file("rows.jsonl", &format!("{row}\n"));
    let train = |out: &str| {
        let run = format!("--model demo/tiny --data rows.jsonl --steps 1 --out {out}");
        tool.run(&run.split(' ').collect::<Vec<_>>(), "")
    };
    train("one")
        .exits(4)
        .says("the loss is no longer a number")
        .says(&format!("`qlora-train inspect '{FOLDER}'` says which"))
        .says(&format!(
            "delete the folder {FOLDER}, to have it downloaded again"
        ))
        .says("train in another folder");
    let found = tool.run(&["inspect", FOLDER], "").exits(0);
    assert!(found.stdout.contains("that are no numbers"), "{found}");
    fs::remove_dir_all(tool.folder().join(FOLDER)).unwrap();
    train("two").exits(0);
    is_whole(&tool);
}

/// Others know the base by its repository's name: the revision is told apart from it.
#[test]
fn a_revision_is_fetched_beside_the_rest_and_stands_beside_the_name() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    let row = json!({"prompt": "Good morning", "completion": "And to you"});
    tool.file("rows.jsonl", &format!("{row}\n"));
    let run = [
        "--model",
        "demo/tiny@v2",
        "--data",
        "rows.jsonl",
        "--out",
        "run",
        "--steps",
        "1",
    ];
    tool.run(&run, "").exits(0);
    assert_eq!(hub.requests()[0].path, "/api/models/demo/tiny/revision/v2");
    assert!(tool.folder().join(FOLDER.to_owned() + "@v2").exists());
    assert!(!tool.folder().join(FOLDER).exists());
    let config: Value = serde_json::from_str(&tool.read("run/adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], "demo/tiny");
    assert_eq!(config["revision"], "v2");
    let card = tool.read("run/README.md");
    assert!(card.contains("base_model: \"demo/tiny\"\n"), "{card}");
    let licence = "The base model's is `apache-2.0` (its README.md). ";
    assert!(card.contains(licence), "{card}");
    for words in [
        "demo/tiny@v2",
        "base = \"demo/tiny\"\n",
        "AutoTokenizer.from_pretrained(base, revision=\"v2\")",
        "AutoModelForCausalLM.from_pretrained(base, revision=\"v2\", dtype",
        "vllm serve demo/tiny --revision v2 ",
    ] {
        assert!(card.contains(words), "{words}\n{card}");
    }
    // The adapter alone leads to the base of that revision.
    let from = format!("demo/tiny@v2 is taken from {FOLDER}@v2");
    let merged = "merge --adapter run --out merged --no-check";
    let merged: Vec<_> = merged.split(' ').collect();
    tool.run(&merged, "").exits(0).says(&from);
    let inspect = || -> Value {
        let inspect = ["inspect", "run", "--json"];
        let run = tool.run(&inspect, "").exits(0).says(&from);
        serde_json::from_str(&run.stdout).unwrap()
    };
    let inspected = inspect();
    assert_eq!(inspected["base"], "demo/tiny@v2");

    // A base that is there by the plain name is another one, here of other layers.
    let other = tool.folder().join(FOLDER);
    fs::create_dir_all(&other).unwrap();
    let config = tool.read(&format!("{FOLDER}@v2/config.json"));
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"] = json!(1);
    config["layer_types"] = Value::Null;
    fs::write(other.join("config.json"), config.to_string()).unwrap();
    assert_eq!(inspect(), inspected);
    let plain = tool
        .run(&["inspect", "run", "--model", FOLDER], "")
        .exits(0);
    assert!(plain.stdout.contains("the base has 1"), "{plain}");
    // --verify looks for it there too, and gets as far as the Python that is not there.
    let verify = ["inspect", "run", "--verify", "--python", "no-such-python"];
    let run = tool.run(&verify, "").exits(2).says(&from);
    assert!(run.stderr.contains("no-such-python cannot be run"), "{run}");
}

/// The cache of `hf download` and transformers, as huggingface_hub 2.4.0 lays it out (see
/// "Understand caching" in its documentation): links to blobs that are named by their hash.
struct HubCache(PathBuf);

impl HubCache {
    /// The demo's model in it, its main branch, fetched whole.
    fn new(tool: &Tool) -> Self {
        Self::of(tool, &files())
    }

    fn of(tool: &Tool, files: &BTreeMap<String, Vec<u8>>) -> Self {
        let cache = Self(tool.folder().join("hf/hub/models--demo--tiny"));
        cache.refer("main", COMMIT);
        for folder in ["blobs", "snapshots"] {
            fs::create_dir_all(cache.0.join(folder)).unwrap();
        }
        fs::create_dir(cache.snapshot()).unwrap();
        let flat = files.iter().filter(|(name, _)| !name.contains('/'));
        for (name, bytes) in flat {
            let small = BLOBS.iter().find(|(small, _)| small == name);
            let hash = match name.ends_with(".safetensors") {
                true => sha256(bytes),
                false => small.map_or(format!("{:040x}", bytes.len()), |(_, id)| (*id).into()),
            };
            let blob = cache.0.join("blobs").join(&hash);
            fs::write(blob, bytes).unwrap();
            let link = Path::new("../../blobs").join(hash);
            symlink(link, cache.snapshot().join(name)).unwrap();
        }
        cache
    }

    fn refer(&self, revision: &str, commit: &str) {
        fs::create_dir_all(self.0.join("refs")).unwrap();
        fs::write(self.0.join("refs").join(revision), commit).unwrap();
    }

    fn snapshot(&self) -> PathBuf {
        self.0.join("snapshots").join(COMMIT)
    }

    fn blob_of(&self, name: &str) -> PathBuf {
        self.snapshot().join(name).canonicalize().unwrap()
    }

    /// Every name with its time and what it links to or how long it is.
    fn look(&self) -> Vec<String> {
        let mut seen = Vec::new();
        let mut folders = vec![self.0.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                let (path, found) = (entry.path(), entry.metadata().unwrap());
                let to = fs::read_link(&path).ok();
                let when = found.modified().unwrap();
                seen.push(format!("{path:?} {to:?} {} {when:?}", found.len()));
                if found.is_dir() {
                    folders.push(path);
                }
            }
        }
        seen.sort();
        seen
    }
}

const TAKEN: &str = "demo/tiny is taken from the Hugging Face cache: hf/hub/models--demo--tiny/snapshots/0123456789ab";

#[test]
fn what_others_have_fetched_is_not_fetched_again() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    let cache = HubCache::new(&tool);
    let before = cache.look();
    let quantize = |model: &str, out: &str| {
        let run = ["--model", model, "--save-quantized", out];
        tool.run(&run, "")
    };
    quantize("demo/tiny", "one").exits(0).says(TAKEN);
    assert!(!tool.folder().join("data/cache/models/demo").exists());
    // Whichever revision leads there: a tag, or the commit itself.
    cache.refer("v2", COMMIT);
    quantize("demo/tiny@v2", "two")
        .exits(0)
        .says("demo/tiny@v2 is taken");
    fs::remove_dir_all(cache.0.join("refs")).unwrap();
    quantize(&format!("demo/tiny@{COMMIT}"), "three").exits(0);
    cache.refer("main", COMMIT);
    assert_eq!(hub.requests().len(), 0);
    for out in ["two", "three"] {
        let bytes = |out: &str| fs::read(tool.folder().join(out).join(WEIGHTS)).unwrap();
        assert!(bytes(out) == bytes("one"), "{out}");
    }
    // A revision that nobody fetched is not another one.
    let dry = "--model demo/tiny@v3 --data rows.jsonl --out run --dry-run";
    tool.file("rows.jsonl", "{}\n");
    tool.run(&dry.split(' ').collect::<Vec<_>>(), "").exits(2);

    // Nothing was written there but what this test wrote.
    let after = cache.look();
    let same = |seen: &Vec<String>| -> Vec<String> {
        let ours = |line: &&String| !line.contains("refs");
        seen.iter().filter(ours).cloned().collect()
    };
    assert_eq!(same(&after), same(&before));

    // Our own download goes first, and a folder of that path before all.
    let own = tool.folder().join(FOLDER);
    fs::create_dir_all(own.parent().unwrap()).unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model");
    symlink(demo.canonicalize().unwrap(), &own).unwrap();
    let from = format!("demo/tiny is taken from {FOLDER}\n");
    quantize("demo/tiny", "four").exits(0).says(&from);
    symlink(
        tool.folder().join("data/cache/models/demo"),
        tool.folder().join("demo"),
    )
    .unwrap();
    let run = quantize("demo/tiny", "five").exits(0);
    assert!(!run.stderr.contains("is taken from"), "{run}");
    assert_eq!(hub.requests().len(), 0);
}

/// It is common there: transformers fetches what it is asked for, `hf download` what it
/// is told.
#[test]
fn half_of_a_model_in_the_hugging_face_cache_is_none() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    tool.file("rows.jsonl", "{}\n");
    let dry = "--model demo/tiny --data rows.jsonl --out run --dry-run";
    let dry: Vec<_> = dry.split(' ').collect();
    let cache = HubCache::new(&tool);
    fs::remove_file(cache.snapshot().join(".gitattributes")).unwrap();
    let lacks = |what: &str| {
        tool.run(&dry, "")
            .exits(2)
            .says(&format!("snapshots/{COMMIT} lacks {what}\n"))
            .says("no model demo/tiny on this machine");
    };
    // The rows are no rows: the model was found.
    let whole = || tool.run(&dry, "").exits(3).says(TAKEN);
    whole();
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        WEIGHTS,
    ] {
        // The link, and then what it leads to.
        for path in [cache.snapshot().join(name), cache.blob_of(name)] {
            let aside = tool.folder().join("aside");
            fs::rename(&path, &aside).unwrap();
            lacks(name);
            fs::rename(&aside, &path).unwrap();
        }
    }
    // The template stands in either.
    let (template, settings) = ("chat_template.jinja", "tokenizer_config.json");
    fs::remove_file(cache.snapshot().join(template)).unwrap();
    whole();
    let settings = cache.snapshot().join(settings);
    let mut keys: Value = serde_json::from_slice(&fs::read(&settings).unwrap()).unwrap();
    let text = keys.as_object_mut().unwrap().remove("chat_template");
    fs::write(&settings, keys.to_string()).unwrap();
    lacks(template);
    let text = text.unwrap();
    fs::write(cache.snapshot().join(template), text.as_str().unwrap()).unwrap();
    whole();
    // The repository has none, and that is known.
    fs::remove_file(cache.snapshot().join("generation_config.json")).unwrap();
    let asked = cache.0.join(".no_exist").join(COMMIT);
    fs::create_dir_all(&asked).unwrap();
    fs::write(asked.join("generation_config.json"), "").unwrap();
    whole();
    fs::remove_dir_all(asked).unwrap();
    lacks("generation_config.json");
    fs::write(cache.snapshot().join(".gitattributes"), "").unwrap();
    whole();

    // Shards: all that the list names.
    let second = "model-00002-of-00002.safetensors";
    let list = json!({"weight_map": {"a": WEIGHTS, "b": second}});
    let index = cache.snapshot().join("model.safetensors.index.json");
    fs::write(&index, list.to_string()).unwrap();
    lacks(second);
    fs::write(&index, "{").unwrap();
    lacks("a readable model.safetensors.index.json");
    fs::remove_file(&index).unwrap();
    whole();
    // Weights in another form are no weights.
    let pickled = cache.snapshot().join("pytorch_model.bin");
    assert!(pickled.exists());
    fs::remove_file(cache.snapshot().join(WEIGHTS)).unwrap();
    lacks(WEIGHTS);
    // A commit's name is a name, not a way out of the cache.
    cache.refer("main", "../snapshots");
    let run = tool.run(&dry, "").exits(2);
    assert!(!run.stderr.contains("Hugging Face cache"), "{run}");
    cache.refer("main", COMMIT);

    assert_eq!(hub.requests().len(), 0);
    tool.run(&FETCH, "")
        .exits(0)
        .says("downloading demo/tiny at");
    is_whole(&tool);
}

#[test]
fn what_is_damaged_in_the_hugging_face_cache_is_fetched_and_left_there() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    let cache = HubCache::new(&tool);
    // As since huggingface_hub 2: a blob may be a link to a store that names it otherwise.
    let blob = cache.blob_of(WEIGHTS);
    let stored = tool.folder().join("hf/hub/stored-by-another-hash");
    fs::rename(&blob, &stored).unwrap();
    symlink(&stored, &blob).unwrap();
    tool.run(&FETCH, "").exits(0).says(TAKEN);

    let whole = fs::read(&stored).unwrap();
    let when = fs::metadata(&stored).unwrap().modified().unwrap();
    let mut damaged = whole.clone();
    damaged[2_000_000] ^= 1;
    fs::write(&stored, &damaged).unwrap();
    // It was held against its name once, and by length and time it is the same.
    let set_time = |when| {
        let file = fs::File::options().write(true).open(&stored).unwrap();
        file.set_modified(when).unwrap();
    };
    let quantize = |out: &str| {
        let run = ["--model", "demo/tiny", "--save-quantized", out];
        tool.run(&run, "").exits(0)
    };
    set_time(when);
    quantize("once").says(TAKEN);
    assert_eq!(hub.requests().len(), 0);

    set_time(when + Duration::from_secs(1));
    let run = quantize("again")
        .says("warning: demo/tiny is not taken from the Hugging Face cache: hf/hub/models--demo--tiny/")
        .says(&format!("is damaged: hf/hub/models--demo--tiny/blobs/{}", sha256(&whole)))
        .says(&format!("has the SHA-256 {}", sha256(&damaged)))
        .says("downloading demo/tiny at");
    assert!(!run.stderr.contains("delete"), "{run}");
    is_whole(&tool);
    assert!(fs::read(&stored).unwrap() == damaged);
}

/// Values that were no numbers before they were fetched have the hash that they are
/// named by; the advice on a folder of ours would spoil the other snapshots there.
#[test]
fn nobody_is_told_to_delete_in_the_hugging_face_cache() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    let mut wrong = (*files()).clone();
    let weights = wrong.get_mut(WEIGHTS).unwrap();
    let end = weights.len() - 2;
    weights[end..].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    let cache = HubCache::of(&tool, &wrong);
    cache.refer("v2", COMMIT);
    let row = json!({"prompt": "Good morning", "completion": "And to you"});
    tool.file("rows.jsonl", &format!("{row}\n"));
    for (model, advice) in [
        ("demo/tiny", "`hf download demo/tiny --force-download`, and"),
        (
            "demo/tiny@v2",
            "`hf download demo/tiny --force-download --revision v2`, and",
        ),
    ] {
        let train = format!("--model {model} --data rows.jsonl --steps 1 --out {model}-run");
        let run = tool
            .run(&train.split(' ').collect::<Vec<_>>(), "")
            .exits(4)
            .says("the loss is no longer a number")
            .says(advice);
        assert!(!run.stderr.contains("delete"), "{run}");
    }
}

#[test]
fn an_interrupted_download_goes_on_at_its_commit() {
    let broken = store(|reply, before| match before {
        0 => reply.cut_after(700_000),
        _ => Reply::text(403, "expired"),
    });
    let hub_of_broken = hub(&broken);
    let first = tool(&hub_of_broken);
    first
        .run(&FETCH, "")
        .exits(4)
        .says("model.safetensors.part")
        .says("403");
    let part = first.folder().join(FOLDER).join("model.safetensors.part");
    assert_eq!(fs::metadata(&part).unwrap().len(), 700_000);
    assert!(!first.folder().join("four").exists());

    // A small file was cut off too.
    let part = part.with_file_name("tokenizer.json.part");
    fs::write(&part, &files()["tokenizer.json"][..1000]).unwrap();

    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let second = first.env("HF_ENDPOINT", &hub.url());
    second.run(&FETCH, "").exits(0);
    is_whole(&second);
    assert_eq!(store.requests()[0].header("range"), Some("bytes=700000-"));
    let asked = hub.requests();
    let tokenizer = asked.iter().find(|r| r.path.ends_with("/tokenizer.json"));
    assert_eq!(tokenizer.unwrap().header("range"), Some("bytes=1000-"));
    assert!(
        hub.requests()[0].path.ends_with(COMMIT),
        "{}",
        hub.requests()[0].path
    );
}

#[test]
fn a_server_that_knows_no_ranges_sends_it_anew() {
    let files = files();
    let whole = Server::start(move |_, before| {
        let reply = Reply::bytes(200, &files[WEIGHTS]);
        if before == 0 {
            reply.cut_after(500_000)
        } else {
            reply
        }
    });
    let hub = hub(&whole);
    let tool = tool(&hub);
    tool.run(&FETCH, "").exits(0);
    is_whole(&tool);
}

#[test]
fn weights_that_are_not_what_the_hub_says_are_deleted() {
    let files = files();
    let store = Server::start(move |_, _| {
        let mut bytes = files[WEIGHTS].clone();
        bytes[2_000_000] ^= 1;
        Reply::bytes(200, &bytes)
    });
    let hub = hub(&store);
    let tool = tool(&hub);
    tool.run(&FETCH, "")
        .exits(4)
        .says("SHA-256")
        .says("deleted");
    assert!(
        !tool
            .folder()
            .join(FOLDER)
            .join("model.safetensors.part")
            .exists()
    );
    assert!(!tool.folder().join(FOLDER).join(WEIGHTS).exists());
}

/// Git's names of the small files are git's own, see [`BLOBS`].
#[test]
fn small_files_that_are_not_what_the_hub_says_are_deleted() {
    for (name, id) in BLOBS {
        let mut sent = (*files()).clone();
        let at = sent[name].len() / 2;
        sent.get_mut(name).unwrap()[at] ^= 1;
        let store = store(|reply, _| reply);
        let hub = hub_of(Arc::new(sent), &store);
        let tool = tool(&hub);
        let run = tool.run(&FETCH, "").exits(4).says("deleted");
        let (_, found) = run
            .stderr
            .split_once(&format!("{FOLDER}/{name}.part has the git blob id "))
            .unwrap_or_else(|| panic!("{run}"));
        let (found, said) = found.split_at(40);
        assert!(
            found.chars().all(|c| c.is_ascii_hexdigit()) && found != id,
            "{run}"
        );
        assert!(
            said.starts_with(&format!(", not {id} as the hub says")),
            "{run}"
        );
        let file = tool.folder().join(FOLDER).join(name);
        assert!(!file.exists() && !file.with_file_name(format!("{name}.part")).exists());
        assert!(!tool.folder().join("four").exists());
        // What came whole before stays; a hub that sends it right completes it.
        let hub = self::hub(&store);
        let tool = tool.env("HF_ENDPOINT", &hub.url());
        tool.run(&FETCH, "").exits(0);
        is_whole(&tool);
    }
}

/// Of small files such a mirror tells no more than the length.
#[test]
fn a_mirror_that_gives_no_git_ids_is_taken_at_its_lengths() {
    for null in [false, true] {
        let store = store(|reply, _| reply);
        let (files, weights) = (files(), store.url());
        let mut answer = revision(&files);
        for file in answer["siblings"].as_array_mut().unwrap() {
            let file = file.as_object_mut().unwrap();
            match null {
                false => drop(file.remove("blobId")),
                true => drop(file.insert("blobId".into(), Value::Null)),
            }
        }
        // The first time a small file comes a byte short.
        let short = files["config.json"].len() - 1;
        let hub = Server::start(move |request, before| {
            let prefix = format!("/demo/tiny/resolve/{COMMIT}/");
            match request.path.strip_prefix(&prefix) {
                None => Reply::json(200, &answer),
                Some(WEIGHTS) => {
                    Reply::text(302, "").header("location", &format!("{weights}/blob/{WEIGHTS}"))
                }
                Some("config.json") if before == 0 => {
                    Reply::bytes(200, &files["config.json"][..short])
                }
                Some(name) => ranged(&files[name], request),
            }
        });
        let tool = tool(&hub);
        tool.run(&FETCH, "").exits(4).says(&format!(
            "config.json.part is {short} bytes, not {}",
            short + 1
        ));
        tool.run(&FETCH, "").exits(0);
        is_whole(&tool);
    }
}

/// What `.env` holds is not shown, and is nobody's matter whose model lies in a folder.
#[test]
fn a_broken_dotenv_is_told_by_its_line() {
    let tool = Tool::new(env!("CARGO_BIN_EXE_qlora-train"));
    for bad in [
        "HF_TOKEN hf_secret",
        "HF_TOKEN",
        "HF_TOKEN=hf_secret of mine",
        "HF_TOKEN='hf_secret",
    ] {
        tool.file(
            ".env",
            &format!("# a comment\nHF_TOKEN_OF_OTHERS=x\n{bad}\n"),
        );
        let run = tool.run(&FETCH, "").exits(2).says(".env:3: no KEY=VALUE");
        assert!(!run.stderr.contains("hf_secret"), "{run}");
    }
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model");
    let model = model.display().to_string();
    tool.run(&["--model", &model, "--save-quantized", "four"], "")
        .exits(0);
    // As a folder for a run a file is none, resumed or not.
    let run = ["--model", &model, "--data", "rows.jsonl", "--out", ".env"];
    for more in [&[][..], &["--resume"]] {
        tool.run(&[&run[..], more].concat(), "")
            .exits(2)
            .says("--out .env is a file");
    }
}

#[test]
fn what_is_not_there_is_told() {
    let store = store(|reply, _| reply);
    let hub = hub(&store);
    let tool = tool(&hub);
    tool.run(&["--model", "demo/other", "--save-quantized", "four"], "")
        .exits(4)
        .says("neither a model in a folder demo/other nor one of that name on http://127.0.0.1")
        .says("needs HF_ENDPOINT_TOKEN (HF_TOKEN goes to https://huggingface.co alone)");
    assert_eq!(hub.requests().len(), 1, "a 404 is final");
    // A mistyped folder looks like a name; whatever the hub says of it.
    let hub = Server::start(|_, _| Reply::text(400, "no"));
    let tool = self::tool(&hub);
    tool.run(&["--model", "no/such", "--save-quantized", "four"], "")
        .exits(4)
        .says("no model in a folder no/such, and the hub could not be asked");
    // Nor is a network that is not there waited for as for one that was.
    let hub = Server::start(|_, _| Reply::hang_up());
    let tool = self::tool(&hub);
    tool.run(&["--model", "no/such", "--save-quantized", "four"], "")
        .exits(4)
        .says("attempt 1 of 3")
        .says("could not be asked");
    assert_eq!(hub.requests().len(), 3);
    assert!(!tool.folder().join("data/cache/models/no").exists());
    // What the cache has of it is in the last line too, where one looks.
    let cache = HubCache::new(&tool);
    fs::remove_file(cache.snapshot().join(WEIGHTS)).unwrap();
    let run = tool.run(&FETCH, "").exits(4);
    let last = run.stderr.lines().last().unwrap();
    let lacks = format!("snapshots/{COMMIT} lacks {WEIGHTS}), and the hub could not be asked");
    assert!(last.contains(&lacks), "{run}");
    assert_eq!(hub.requests().len(), 6);
    tool.file("rows.jsonl", "{}\n");
    let dry = ["--model", "no/such", "--data", "rows.jsonl", "--out", "run"];
    tool.run(&[&dry[..], &["--dry-run"]].concat(), "")
        .exits(2)
        .says("no model no/such on this machine, and --dry-run downloads none");
    assert_eq!(hub.requests().len(), 6);
    for path in ["nowhere", "a/b/c", "../up", "./demo/tiny", "/demo/tiny"] {
        tool.run(&["--model", path, "--save-quantized", "four"], "")
            .exits(2)
            .says(&format!("no model in {path}"));
    }
    // A token crosses no network in clear text.
    let tool = tool.env("HF_ENDPOINT", "http://hub.example");
    tool.run(&FETCH, "")
        .exits(2)
        .says("HF_ENDPOINT")
        .says("clear text");
}
