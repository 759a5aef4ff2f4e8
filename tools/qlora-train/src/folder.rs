//! The output folder: what a run is, its figures, its checkpoints.
//!
//!     run.json                     settings, data and model of the run
//!     metrics.jsonl timing.jsonl   a line a step; timing is what no re-run repeats
//!     checkpoints/step-N/          adapter, moments, and how long the files were
//!     checkpoints/best.safetensors the parameters of the best held-out loss, if asked for
//!     save-now                     put there by hand: save a checkpoint at the next step
//!     adapter_model.safetensors    last: with it the run is finished
//!
//! A checkpoint appears whole: written as `step-N.tmp`, synced, renamed. On
//! resuming, the figures are cut back to what the checkpoint knew, so that an
//! interrupted run leaves the same bytes as one that was not.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::Failure;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

/// What a run is: two runs with the same identity give the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the folder.
    pub v: u64,
    /// Version of the tool.
    pub version: String,
    /// `key = value` lines of the settings.
    pub settings: Vec<String>,
    /// SHA-256 over the encoded rows.
    pub data: String,
    /// SHA-256 over the base model's files.
    pub model: String,
    /// `cpu` or `cuda`: their last bits differ.
    pub device: String,
    /// SHA-256 over the adapter that the run started from, if any.
    pub init_adapter: Option<String>,
}

impl Identity {
    /// What differs from the run that is there already, in words.
    fn changes_from(&self, old: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for new in &self.settings {
            let key = new.split(" = ").next().unwrap_or(new);
            let was = old
                .settings
                .iter()
                .find(|line| line.split(" = ").next() == Some(key));
            match was {
                Some(was) if was == new => {}
                Some(was) => changes.push(format!(
                    "{new}, was {}",
                    was.split(" = ").nth(1).unwrap_or_default()
                )),
                None => changes.push(format!("{new}, which that run did not know")),
            }
        }
        let parts = [
            ("the data", self.data != old.data),
            ("the base model", self.model != old.model),
        ];
        changes.extend(
            parts
                .iter()
                .filter(|(_, changed)| *changed)
                .map(|(what, _)| format!("{what} changed")),
        );
        if self.init_adapter != old.init_adapter {
            changes.push("the adapter to start from changed".into());
        }
        if self.device != old.device {
            changes.push(format!("device {}, was {}", self.device, old.device));
        }
        if self.version != old.version {
            changes.push(format!("version {}, was {}", self.version, old.version));
        }
        changes
    }
}

/// The trainable state after some step.
pub struct State {
    /// Updates done.
    pub step: u64,
    /// All adapter parameters, flat.
    pub params: Vec<f32>,
    /// AdamW's first moments.
    pub m: Vec<f32>,
    /// AdamW's second moments.
    pub v: Vec<f32>,
}

#[derive(Serialize, Deserialize)]
struct Cut {
    step: u64,
    metrics_bytes: u64,
    timing_bytes: u64,
}

/// An output folder, locked against a second process.
pub struct Folder {
    path: PathBuf,
    _lock: File,
    metrics: File,
    timing: File,
}

/// How a folder was found.
pub enum Found {
    /// Nothing done yet.
    Fresh(Folder),
    /// A checkpoint to go on from.
    Resumed(Folder, Box<State>),
    /// The run is finished.
    Finished,
}

impl Folder {
    /// Opens the folder for a run. Without `resume` one that holds a run is
    /// refused; with it, one that holds another run is, naming what differs.
    pub fn open(path: &Path, resume: bool, identity: &Identity) -> Result<Found> {
        let usage = |text: String| anyhow::Error::from(Failure::Usage(text));
        let name = path.display();
        if path.exists() && !resume {
            return Err(usage(format!(
                "--out {name} exists; --resume goes on with it, or name another folder"
            )));
        }
        fs::create_dir_all(path).with_context(|| format!("{name}"))?;
        let lock_path = path.join(".lock");
        let lock = File::create(&lock_path).with_context(|| lock_path.display().to_string())?;
        if lock.try_lock().is_err() {
            return Err(usage(format!(
                "--out {name} is in use by another qlora-train"
            )));
        }
        let run = path.join("run.json");
        if run.exists() {
            let text = fs::read_to_string(&run).with_context(|| run.display().to_string())?;
            let old: Identity = serde_json::from_str(&text).map_err(|e| {
                Failure::World(format!(
                    "{}: {e}; delete {name} or name another folder",
                    run.display()
                ))
            })?;
            let changes = identity.changes_from(&old);
            if !changes.is_empty() {
                return Err(usage(format!(
                    "--out {name} holds another run: {}; name another folder (make: RUN=new)",
                    changes.join("; ")
                )));
            }
        } else {
            let text = serde_json::to_string_pretty(identity)? + "\n";
            jsonl::write_atomically(&run, text.as_bytes())?;
        }
        if path.join("adapter_model.safetensors").exists() {
            return Ok(Found::Finished);
        }
        let open = |file: &str| -> Result<File> {
            let path = path.join(file);
            File::options()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| path.display().to_string())
        };
        let folder = Self {
            path: path.to_owned(),
            _lock: lock,
            metrics: open("metrics.jsonl")?,
            timing: open("timing.jsonl")?,
        };
        let Some(checkpoint) = folder.newest()? else {
            folder.cut(0, 0)?;
            return Ok(Found::Fresh(folder));
        };
        let (state, cut) = read_checkpoint(&checkpoint).with_context(|| {
            format!(
                "{}: delete it to go on from the one before",
                checkpoint.display()
            )
        })?;
        folder.cut(cut.metrics_bytes, cut.timing_bytes)?;
        Ok(Found::Resumed(folder, Box::new(state)))
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The evaluations in the figures: step and held-out loss.
    pub fn eval_losses(&self) -> Result<Vec<(u64, f64)>> {
        #[derive(Deserialize)]
        struct Line {
            step: u64,
            eval_loss: Option<f64>,
        }
        let path = self.path.join("metrics.jsonl");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut seen = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line: Line = serde_json::from_str(line)
                .with_context(|| format!("{}:{}", path.display(), at + 1))?;
            seen.extend(line.eval_loss.map(|loss| (line.step, loss)));
        }
        Ok(seen)
    }

    /// Keeps the parameters with the best held-out loss so far.
    pub fn save_best(&self, step: u64, params: &[f32]) -> Result<()> {
        let bytes = bytes(params);
        let view = TensorView::new(Dtype::F32, vec![params.len()], &bytes)?;
        let step = HashMap::from([("step".to_owned(), step.to_string())]);
        let file = safetensors::serialize([("params", view)], Some(step))?;
        Ok(jsonl::write_atomically(&self.best(), &file)?)
    }

    /// The parameters that [`save_best`](Self::save_best) kept at that step.
    pub fn read_best(&self, step: u64) -> Result<Vec<f32>> {
        let path = self.best();
        let name = || path.display().to_string();
        let bytes = fs::read(&path).with_context(name)?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).with_context(name)?;
        let kept = metadata.metadata().as_ref().and_then(|m| m.get("step"));
        if kept != Some(&step.to_string()) {
            let cause = format!(
                "{} is not of step {step}, the best by metrics.jsonl",
                name()
            );
            return Err(Failure::World(cause).into());
        }
        floats(
            &SafeTensors::deserialize(&bytes).with_context(name)?,
            "params",
        )
        .with_context(name)
    }

    fn best(&self) -> PathBuf {
        self.checkpoints().join("best.safetensors")
    }

    /// Whether someone put a file `save-now` into the folder; it is taken away.
    pub fn asked_to_save(&self) -> Result<bool> {
        let path = self.path.join("save-now");
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Appends a line of figures.
    pub fn metric(&mut self, line: &str) -> Result<()> {
        writeln!(self.metrics, "{line}")
            .with_context(|| self.path.join("metrics.jsonl").display().to_string())
    }

    /// Appends a line of times.
    pub fn timing(&mut self, line: &str) -> Result<()> {
        writeln!(self.timing, "{line}")
            .with_context(|| self.path.join("timing.jsonl").display().to_string())
    }

    fn cut(&self, metrics_bytes: u64, timing_bytes: u64) -> Result<()> {
        for (file, name, bytes) in [
            (&self.metrics, "metrics.jsonl", metrics_bytes),
            (&self.timing, "timing.jsonl", timing_bytes),
        ] {
            let path = self.path.join(name);
            let length = file
                .metadata()
                .with_context(|| path.display().to_string())?
                .len();
            if length < bytes {
                let cause = format!(
                    "{} is shorter than its checkpoint says: it was changed by hand",
                    path.display()
                );
                return Err(Failure::World(cause).into());
            }
            file.set_len(bytes)
                .with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Every finished checkpoint, oldest first.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let folder = self.checkpoints();
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry.with_context(|| folder.display().to_string())?.path();
            let name = path
                .file_name()
                .and_then(|n| n.to_str())
                .unwrap_or_default();
            if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
                found.push((step, path));
            }
        }
        found.sort();
        Ok(found)
    }

    fn newest(&self) -> Result<Option<PathBuf>> {
        Ok(self.list()?.pop().map(|(_, path)| path))
    }

    /// Saves a checkpoint and drops the oldest above `keep` (0 keeps all).
    pub fn save(&mut self, state: &State, keep: usize) -> Result<()> {
        let target = self.checkpoints().join(format!("step-{}", state.step));
        if target.exists() {
            return Ok(()); // the same step of the same run is the same state
        }
        let part = self.checkpoints().join(format!("step-{}.tmp", state.step));
        let write = || -> Result<()> {
            if part.exists() {
                fs::remove_dir_all(&part)?;
            }
            fs::create_dir_all(&part)?;
            let bytes = |values: &[f32]| {
                values
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect::<Vec<u8>>()
            };
            let (params, m, v) = (bytes(&state.params), bytes(&state.m), bytes(&state.v));
            let view = |bytes| TensorView::new(Dtype::F32, vec![state.params.len()], bytes);
            let tensors = [
                ("params", view(&params)?),
                ("m", view(&m)?),
                ("v", view(&v)?),
            ];
            let file = part.join("state.safetensors");
            synced(&file, &safetensors::serialize(tensors, None)?)?;
            self.metrics.sync_all()?;
            self.timing.sync_all()?;
            let cut = Cut {
                step: state.step,
                metrics_bytes: self.metrics.metadata()?.len(),
                timing_bytes: self.timing.metadata()?.len(),
            };
            synced(&part.join("state.json"), &serde_json::to_vec(&cut)?)?;
            fs::rename(&part, &target)?;
            File::open(self.path.join("checkpoints"))?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("saving {}", target.display()))?;
        let mut all = self.list()?;
        while keep > 0 && all.len() > keep {
            let (_, oldest) = all.remove(0);
            fs::remove_dir_all(&oldest).with_context(|| oldest.display().to_string())?;
        }
        Ok(())
    }
}

fn synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

fn read_checkpoint(path: &Path) -> Result<(State, Cut)> {
    let cut: Cut = serde_json::from_slice(&fs::read(path.join("state.json"))?)?;
    let bytes = fs::read(path.join("state.safetensors"))?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let read = |name: &str| floats(&tensors, name);
    let state = State {
        step: cut.step,
        params: read("params")?,
        m: read("m")?,
        v: read("v")?,
    };
    let length = state.params.len();
    anyhow::ensure!(
        state.m.len() == length && state.v.len() == length,
        "parameters and moments differ in length"
    );
    Ok((state, cut))
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(tensors: &SafeTensors, name: &str) -> Result<Vec<f32>> {
    let tensor = tensors.tensor(name)?;
    anyhow::ensure!(
        tensor.dtype() == Dtype::F32,
        "{name} is {:?}, not F32",
        tensor.dtype()
    );
    Ok(tensor
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect())
}
