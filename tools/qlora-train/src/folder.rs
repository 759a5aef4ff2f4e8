//! The output folder: what a run is, its figures, its checkpoints.
//!
//!     run.json                     settings, data and model of the run
//!     metrics.jsonl timing.jsonl   a line a step; timing is what no re-run repeats
//!     checkpoints/step-N/          adapter, moments, and how long the files were
//!     checkpoints/best.safetensors the parameters of the best held-out loss, if asked for
//!     save-now                     put there by hand: save a checkpoint at the next step
//!     rows.jsonl                   which rows were trained on and held out: hashes, for gen-eval
//!     SHA256SUMS                   of the adapter's files, for `sha256sum --check`
//!     adapter_model.safetensors    last: with it the run is finished
//!
//! A checkpoint appears whole: written as `step-N.tmp`, synced, renamed; what a killed
//! save left of one is removed. On resuming, the figures are cut back to what the
//! checkpoint knew, so that an interrupted run leaves the same bytes as one that was not.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, Read, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use cli::Failure;
use qwen3::{CodedMoment, Moments};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::{Deserialize, Serialize};

/// What a run is: on one kind of processor, or GPU, two runs with the same identity
/// give the same figures and the same adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the folder.
    pub v: u64,
    /// Version of the tool.
    pub version: String,
    /// `key = value` lines of the settings.
    pub settings: Vec<String>,
    /// Most tokens of a pass. Not compared but taken over by a run that goes on: it
    /// depends on how much memory there was, and the last bits depend on it.
    pub pass_tokens: usize,
    /// SHA-256 over the encoded rows.
    pub data: String,
    /// SHA-256 over the base model's files.
    pub model: String,
    /// `cpu` or `cuda`: their last bits differ.
    pub device: String,
    /// The GPU and its libraries. Not compared: on others a run goes on, to other last bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
    /// SHA-256 over the adapter that the run started from, if any.
    pub init_adapter: Option<String>,
}

impl Identity {
    /// The settings, keys and values apart.
    fn keys(&self) -> Vec<(&str, &str)> {
        let lines = self.settings.iter();
        lines
            .map(|line| line.split_once(" = ").unwrap_or((line, "")))
            .collect()
    }

    /// What differs from the run that is there already, in words.
    fn changes_from(&self, old: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        let [new, was] = [self, old].map(Self::keys);
        for (key, now) in new.iter().filter(|line| !was.contains(line)) {
            changes.push(match was.iter().find(|(other, _)| other == key) {
                Some((_, before)) => format!("{key} = {now}, was {before}"),
                None => format!("{key} = {now}, which that run did not have"),
            });
        }
        // Each entry of a pattern is a key of its own.
        for (key, before) in &was {
            if !new.iter().any(|(other, _)| other == key) {
                changes.push(format!("no {key}, was {before}"));
            }
        }
        if changes.is_empty() && self.settings != old.settings {
            changes.push(
                "lora.rank_pattern or lora.alpha_pattern has another order, and the first that fits holds"
                    .into(),
            );
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

/// Whether an adapter is in `path` already.
pub fn is_finished(path: &Path) -> bool {
    path.join("adapter_model.safetensors").exists()
}

/// Whether the finished adapter in `path` is that run's; nothing is written.
///
/// # Errors
/// If another run is there, or the adapter is not as it was written.
pub fn check_finished(path: &Path, identity: &Identity) -> Result<()> {
    check_same(path, identity)?;
    check_adapter(path)
}

fn check_adapter(path: &Path) -> Result<()> {
    match check_whole(path) {
        Ok(()) => Ok(()),
        Err(doubt) => Err(Failure::World(doubt.with_remedy(path)?).into()),
    }
}

/// Whether the run that is in `path` is this one, if there is one.
///
/// # Errors
/// If another is there, with what differs, or something that is no run.
pub fn check_same(path: &Path, identity: &Identity) -> Result<bool> {
    let usage = |text: String| anyhow::Error::from(Failure::Usage(text));
    let (name, run) = (path.display(), path.join(RUN));
    if !run.exists() {
        return match OURS.iter().find(|file| path.join(file).exists()) {
            None => Ok(false),
            Some(there) => Err(usage(format!(
                "--out {name} has {there} and no {RUN}: not a run that can go on; name another folder"
            ))),
        };
    }
    let old: Identity = serde_json::from_slice(&qwen3::read(&run)?).map_err(|e| {
        let remedy = "without it nobody can tell which run this is: put it back from a copy, or train in another folder";
        Failure::World(format!("{}: {e}; {remedy} (make: RUN=new)", run.display()))
    })?;
    let changes = identity.changes_from(&old);
    if !changes.is_empty() {
        return Err(usage(format!(
            "--out {name} holds another run: {}; name another folder (make: RUN=new)",
            changes.join("; ")
        )));
    }
    Ok(true)
}

/// The fingerprint of the base that the adapter in `path` was trained on, if it is a
/// run's.
///
/// # Errors
/// If it is one that cannot be read.
pub fn trained_on(path: &Path) -> Result<Option<String>> {
    let run = path.join(RUN);
    if !run.exists() {
        return Ok(None);
    }
    let identity: Identity =
        serde_json::from_slice(&qwen3::read(&run)?).with_context(|| run.display().to_string())?;
    Ok(Some(identity.model))
}

/// What the run that is in `path` took over without being compared, if there is one that can
/// be read: most tokens of a pass, and its GPU.
pub fn began_with(path: &Path) -> Option<(usize, Option<String>)> {
    let run = qwen3::read(&path.join(RUN)).ok()?;
    let run: Identity = serde_json::from_slice(&run).ok()?;
    Some((run.pass_tokens, run.hardware))
}

/// The trainable state after some step.
pub struct State {
    /// Updates done.
    pub step: u64,
    /// All adapter parameters, flat.
    pub params: Vec<f32>,
    /// AdamW's moments.
    pub moments: Moments,
}

#[derive(Serialize, Deserialize)]
struct Cut {
    step: u64,
    metrics_bytes: u64,
    timing_bytes: u64,
    /// SHA-256 of so many bytes of metrics.jsonl: the best adapter is told by them.
    metrics: String,
    /// SHA-256 of state.safetensors: a flipped bit would train on, unseen.
    state: String,
    /// SHA-256 of the run's run.json: another's checkpoint would train on, unseen.
    run: String,
    /// SHA-256 of all the above, see [`Cut::sum`].
    sum: String,
}

impl Cut {
    /// What `sum` must be.
    fn sum(&self) -> String {
        let Self {
            step,
            metrics_bytes,
            timing_bytes,
            metrics,
            state,
            run,
            sum: _,
        } = self;
        let all = format!("{step} {metrics_bytes} {timing_bytes} {metrics} {state} {run}");
        cli::sha256_hex(all.as_bytes())
    }
}

const RUN: &str = "run.json";

const LOCK: &str = ".lock";

const METRICS: &str = "metrics.jsonl";

const TIMING: &str = "timing.jsonl";

const CHECKPOINTS: &str = "checkpoints";

const SUMS: &str = "SHA256SUMS";

/// What a run writes, beside run.json, which comes first.
const OURS: [&str; 9] = [
    METRICS,
    TIMING,
    CHECKPOINTS,
    "README.md",
    qwen3::SETTINGS,
    qwen3::ROWS,
    SUMS,
    SUMMED[0],
    SUMMED[1],
];

/// The files of a finished adapter that make what it computes.
const SUMMED: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Notes the sums of the adapter's files, which lie in `part` still, of its rows and settings.
pub fn write_sums(folder: &Path, part: &Path) -> Result<()> {
    let mut text = String::new();
    for name in SUMMED {
        let file = part.join(name);
        let sum = cli::sha256_file(&file).with_context(|| file.display().to_string())?;
        text.push_str(&format!("{sum}  {name}\n"));
    }
    for name in [qwen3::ROWS, qwen3::SETTINGS] {
        let file = folder.join(name);
        let sum = cli::sha256_file(&file).with_context(|| file.display().to_string())?;
        text.push_str(&format!("{sum}  {name}\n"));
    }
    Ok(jsonl::write_atomically(
        &folder.join(SUMS),
        text.as_bytes(),
    )?)
}

/// Why a finished adapter is not taken for one.
enum Doubt {
    /// It is not as it was written.
    Damaged(String),
    /// Nobody can tell; with what helps whoever trusts it.
    Unknown(String),
}

impl Doubt {
    /// The cause, and what helps in the folder as it is: an adapter that no checkpoint
    /// is left of must not be given up for nothing.
    fn with_remedy(&self, folder: &Path) -> Result<String> {
        let again = checkpoints(folder)?.pop().map(|(step, _)| {
            let weights = SUMMED[1];
            format!("move {weights} away, and --resume writes it again from step {step}")
        });
        Ok(match (self, again) {
            (Self::Damaged(cause), Some(again)) => format!("{cause}; {again}"),
            (Self::Damaged(cause), None) => format!(
                "{cause}; no checkpoint is left to write it again from: train in another folder (make: RUN=new)"
            ),
            (Self::Unknown(cause), Some(again)) => format!("{cause}; else {again}"),
            (Self::Unknown(cause), None) => cause.clone(),
        })
    }
}

/// Whether a finished adapter is as it was written. Its sums came before it: where they
/// are gone, or one of them is, nobody can tell.
fn check_whole(folder: &Path) -> Result<(), Doubt> {
    let sums = folder.join(SUMS);
    let unread = |error: std::io::Error| {
        let (sums, remedy) = (sums.display(), qwen3::note_sums(folder));
        Doubt::Unknown(format!("{sums}: {error}; {remedy}"))
    };
    if fs::metadata(&sums).map_err(unread)?.is_dir() {
        return Err(unread(std::io::ErrorKind::IsADirectory.into()));
    }
    qwen3::check_sums(folder).map_err(|error| match error {
        qwen3::Error::Read { path, source } if path == sums => unread(source),
        qwen3::Error::File { ref path, .. } if *path == sums => Doubt::Unknown(error.to_string()),
        _ => Doubt::Damaged(format!("{:#}", anyhow::Error::new(error))),
    })?;
    // Without it gen-eval, which only warns, would ask in other words.
    let settings = folder.join(qwen3::SETTINGS);
    match settings.exists() {
        true => Ok(()),
        false => Err(Doubt::Damaged(format!("{} is gone", settings.display()))),
    }
}

/// Every finished checkpoint of a run's folder, oldest first.
fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = folder.join(CHECKPOINTS);
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

/// Removes what killed saves left. With the lock held nobody is writing there.
fn remove_unfinished(folder: &Path) -> Result<()> {
    let folder = folder.join(CHECKPOINTS);
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let step = name.and_then(|name| name.strip_prefix("step-")?.strip_suffix(".tmp"));
        if step.is_some_and(|step| step.parse::<u64>().is_ok()) && path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// What to tell where a folder's lock is not to be had.
fn not_locked(folder: &Path, error: TryLockError) -> Failure {
    let name = folder.display();
    match error {
        TryLockError::WouldBlock => {
            Failure::Usage(format!("--out {name} is in use by another qlora-train"))
        }
        TryLockError::Error(cause) => Failure::World(format!(
            "locking {}: {cause}; without a lock two runs could write there: name a folder on another disk",
            folder.join(LOCK).display()
        )),
    }
}

/// A line of metrics.jsonl, of an update or of an evaluation.
#[derive(Deserialize)]
pub struct Figures {
    /// Updates done.
    pub step: u64,
    /// Of an update.
    pub loss: Option<f64>,
    /// Of an update.
    pub grad_norm: Option<f64>,
    /// Of an evaluation.
    pub eval_loss: Option<f64>,
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
        let lock_path = path.join(LOCK);
        refuse_pipe(&lock_path)?;
        let lock = File::create(&lock_path).with_context(|| lock_path.display().to_string())?;
        lock.try_lock().map_err(|error| not_locked(path, error))?;
        let run = path.join(RUN);
        if !check_same(path, identity)? {
            let text = serde_json::to_string_pretty(identity)? + "\n";
            jsonl::write_atomically(&run, text.as_bytes())?;
        }
        if is_finished(path) {
            check_adapter(path)?;
            return Ok(Found::Finished);
        }
        remove_unfinished(path)?;
        let open = |file: &str| -> Result<File> {
            let path = path.join(file);
            refuse_pipe(&path)?;
            File::options()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| path.display().to_string())
        };
        let folder = Self {
            path: path.to_owned(),
            _lock: lock,
            metrics: open(METRICS)?,
            timing: open(TIMING)?,
        };
        let Some(checkpoint) = folder.newest()? else {
            folder.cut_back(None)?;
            return Ok(Found::Fresh(folder));
        };
        let (state, cut) = read_checkpoint(&checkpoint, &run).with_context(|| {
            let remedy = match checkpoints(path).is_ok_and(|all| all.len() > 1) {
                true => "delete it to go on from the one before",
                false => "there is none before it: without it the run begins anew",
            };
            format!("{}: {remedy}", checkpoint.display())
        })?;
        folder.cut_back(Some(&cut))?;
        Ok(Found::Resumed(folder, Box::new(state)))
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The figures so far.
    pub fn figures(&self) -> Result<Vec<Figures>> {
        let path = self.path.join(METRICS);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let line = |(at, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), at + 1))
        };
        text.lines().enumerate().map(line).collect()
    }

    /// Keeps the parameters with the best held-out loss so far.
    pub fn save_best(&self, step: u64, params: &[f32]) -> Result<()> {
        let path = self.best();
        let step = HashMap::from([("step".to_owned(), step.to_string())]);
        let mut file = jsonl::AtomicFile::create(&path)?;
        write_tensors(
            &mut file,
            &mut [("params", Values::F32(params))],
            Some(step),
        )
        .with_context(|| path.display().to_string())?;
        // Its name is synced with the checkpoint's, which lies beside it.
        Ok(file.commit()?)
    }

    /// The parameters that [`save_best`](Self::save_best) kept at that step.
    pub fn read_best(&self, step: u64) -> Result<Vec<f32>> {
        let path = self.best();
        let name = || path.display().to_string();
        let bytes = qwen3::read(&path)?;
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
    ///
    /// # Errors
    /// If it cannot be taken away; no reason to end a run.
    pub fn asked_to_save(&self) -> Result<bool> {
        let path = self.path.join("save-now");
        let removed = match path.is_dir() {
            true => fs::remove_dir(&path),
            false => fs::remove_file(&path),
        };
        match removed {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Appends a line of figures.
    pub fn metric(&mut self, line: &str) -> Result<()> {
        writeln!(self.metrics, "{line}")
            .with_context(|| self.path.join(METRICS).display().to_string())
    }

    /// Appends a line of times.
    pub fn timing(&mut self, line: &str) -> Result<()> {
        writeln!(self.timing, "{line}")
            .with_context(|| self.path.join(TIMING).display().to_string())
    }

    /// Cuts the figures back to what a checkpoint knew; nothing where there is none.
    fn cut_back(&self, cut: Option<&Cut>) -> Result<()> {
        let path = self.path.join(METRICS);
        let bytes = cut.map_or(0, |cut| cut.metrics_bytes);
        if let Some(cut) =
            cut.filter(|cut| begin_sum(&path, bytes).ok().as_ref() != Some(&cut.metrics))
        {
            let cause = format!(
                "{} is not as it was at {CHECKPOINTS}/step-{}: put it back from a copy, or train in another folder \
                 (make: RUN=new); if only its end is changed, delete that checkpoint to go on from the one before",
                path.display(),
                cut.step
            );
            return Err(Failure::World(cause).into());
        }
        (self.metrics.set_len(bytes)).with_context(|| path.display().to_string())?;
        // No result depends on the times: they may have been lost.
        let (path, timing) = (self.path.join(TIMING), &self.timing);
        let bytes = cut.map_or(0, |cut| cut.timing_bytes);
        (timing.metadata())
            .and_then(|found| timing.set_len(bytes.min(found.len())))
            .with_context(|| path.display().to_string())
    }

    fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    fn newest(&self) -> Result<Option<PathBuf>> {
        Ok(checkpoints(&self.path)?.pop().map(|(_, path)| path))
    }

    /// Begins to save the checkpoint of a step, with the figures that there are now, and a
    /// state that is still on its way from the device; then the oldest above `keep` are
    /// dropped (0 keeps all).
    ///
    /// # Errors
    /// If the figures cannot be read.
    pub fn save(
        &self,
        step: u64,
        state: impl FnOnce() -> Result<State> + Send + 'static,
        keep: usize,
    ) -> Result<Saving> {
        let target = self.checkpoints().join(format!("step-{step}"));
        if target.exists() {
            // The same step of the same run is the same state.
            return Ok(Saving {
                step,
                writing: None,
            });
        }
        let saving = format!("saving {}", target.display());
        let begin = || -> Result<_> {
            let metrics_bytes = self.metrics.metadata()?.len();
            let cut = Cut {
                step,
                metrics_bytes,
                metrics: begin_sum(&self.path.join(METRICS), metrics_bytes)?,
                timing_bytes: self.timing.metadata()?.len(),
                state: String::new(),
                run: cli::sha256_file(&self.path.join(RUN))?,
                sum: String::new(),
            };
            Ok((cut, [self.metrics.try_clone()?, self.timing.try_clone()?]))
        };
        let (cut, figures) = begin().with_context(|| saving.clone())?;
        let folder = self.path.clone();
        let write = move || {
            write_checkpoint(&folder, &state()?, cut, figures).context(saving)?;
            let mut all = checkpoints(&folder)?;
            while keep > 0 && all.len() > keep {
                let (_, oldest) = all.remove(0);
                fs::remove_dir_all(&oldest).with_context(|| oldest.display().to_string())?;
            }
            Ok(())
        };
        let no_thread = || format!("saving {}: no thread for it", target.display());
        let writing = thread::Builder::new()
            .spawn(write)
            .with_context(no_thread)?;
        Ok(Saving {
            step,
            writing: Some(writing),
        })
    }
}

/// A checkpoint on its way to the disk, which takes seconds: the training goes on.
pub struct Saving {
    /// Whose it is.
    pub step: u64,
    writing: Option<JoinHandle<Result<()>>>,
}

impl Saving {
    /// Whether nothing is left to wait for.
    pub fn is_done(&self) -> bool {
        self.writing.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for it.
    ///
    /// # Errors
    /// If it was not saved.
    pub fn finish(mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else {
            return Ok(());
        };
        writing.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for Saving {
    /// What ends a run loses no checkpoint that was begun before.
    fn drop(&mut self) {
        if let Some(writing) = self.writing.take() {
            let _ = writing.join();
        }
    }
}

/// Writes a checkpoint that appears whole or not at all, behind the figures that it goes
/// with.
fn write_checkpoint(folder: &Path, state: &State, mut cut: Cut, figures: [File; 2]) -> Result<()> {
    let all = folder.join(CHECKPOINTS);
    let (part, target) = (
        all.join(format!("step-{}.tmp", cut.step)),
        all.join(format!("step-{}", cut.step)),
    );
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    fs::create_dir_all(&part)?;
    let tensors = part.join("state.safetensors");
    let mut file = BufWriter::with_capacity(PIECE, File::create(&tensors)?);
    write_tensors(&mut file, &mut tensors_of(state), None)?;
    file.flush()?;
    file.get_ref().sync_all()?;
    for file in figures {
        file.sync_all()?;
    }
    cut.state = cli::sha256_file(&tensors)?;
    cut.sum = cut.sum();
    synced(&part.join("state.json"), &serde_json::to_vec(&cut)?)?;
    sync_names(&part)?;
    fs::rename(&part, &target)?;
    sync_names(&all)?;
    // The first one's folder has just come into it.
    Ok(sync_names(folder)?)
}

/// Waits until the names of what is in a folder are on the disk, as a file's own sync does
/// not.
pub fn sync_names(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Values of a tensor.
#[derive(Clone, Copy)]
enum Values<'a> {
    F32(&'a [f32]),
    U8(&'a [u8]),
}

impl Values<'_> {
    fn info(self, at: usize) -> TensorInfo {
        let (dtype, len, bytes) = match self {
            Self::F32(values) => (Dtype::F32, values.len(), size_of_val(values)),
            Self::U8(values) => (Dtype::U8, values.len(), values.len()),
        };
        TensorInfo {
            dtype,
            shape: vec![len],
            data_offsets: (at, at + bytes),
        }
    }
}

/// Bytes that are made of values at a time.
const PIECE: usize = 1 << 18;

/// A checkpoint's tensors: `params`, and `m` and `v`, or, in 8 bits, the codes and
/// scales of each.
fn tensors_of(state: &State) -> Vec<(&'static str, Values<'_>)> {
    let mut tensors = vec![("params", Values::F32(&state.params))];
    match &state.moments {
        Moments::F32 { m, v } => {
            tensors.extend([("m", Values::F32(m)), ("v", Values::F32(v))]);
        }
        Moments::EightBit { m, v } => tensors.extend([
            ("m.codes", Values::U8(&m.codes)),
            ("m.absmax", Values::F32(&m.absmax)),
            ("v.codes", Values::U8(&v.codes)),
            ("v.absmax", Values::F32(&v.absmax)),
        ]),
    }
    tensors
}

/// Writes the file that [`safetensors::serialize`] makes of these tensors, header first and
/// then values a piece at a time: an adapter of a high rank with its moments is gigabytes,
/// which would be in memory three times over.
fn write_tensors(
    out: &mut impl Write,
    tensors: &mut [(&str, Values<'_>)],
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    // Their order: the widest type first, for alignment, then by name.
    tensors.sort_by_key(|&(name, values)| {
        let narrow = matches!(values, Values::U8(_));
        (narrow, name.to_owned())
    });
    let mut at = 0;
    let infos = tensors.iter().map(|(name, values)| {
        let info = values.info(at);
        at = info.data_offsets.1;
        ((*name).to_owned(), info)
    });
    let mut header = serde_json::to_vec(&Metadata::new(metadata, infos.collect())?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut piece = Vec::with_capacity(PIECE);
    for (_, values) in tensors {
        match values {
            Values::U8(values) => out.write_all(values)?,
            Values::F32(values) => {
                for values in values.chunks(PIECE / size_of::<f32>()) {
                    piece.clear();
                    piece.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                    out.write_all(&piece)?;
                }
            }
        }
    }
    Ok(())
}

fn synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

/// Refuses to open for writing what could be waited for without end.
fn refuse_pipe(path: &Path) -> Result<(), Failure> {
    match path.metadata().is_ok_and(|found| !found.is_file()) {
        true => Err(Failure::World(format!(
            "{}: is no regular file",
            path.display()
        ))),
        false => Ok(()),
    }
}

/// SHA-256 of a file's first bytes.
fn begin_sum(path: &Path, bytes: u64) -> std::io::Result<String> {
    let mut begin = Vec::new();
    File::open(path)?.take(bytes).read_to_end(&mut begin)?;
    Ok(cli::sha256_hex(&begin))
}

/// The state that a checkpoint holds, if it is the run's whose run.json is `run`.
fn read_checkpoint(path: &Path, run: &Path) -> Result<(State, Cut)> {
    let cut = serde_json::from_slice(&qwen3::read(&path.join("state.json"))?);
    let cut: Cut = cut.context("state.json")?;
    anyhow::ensure!(cut.sum == cut.sum(), "state.json is not as it was written");
    anyhow::ensure!(
        path.file_name() == Some(format!("step-{}", cut.step).as_ref()),
        "is of step {}",
        cut.step
    );
    anyhow::ensure!(
        cli::sha256_file(run)? == cut.run,
        "is of another run than run.json"
    );
    let bytes = qwen3::read(&path.join("state.safetensors"))?;
    anyhow::ensure!(
        cli::sha256_hex(&bytes) == cut.state,
        "state.safetensors is not as it was written"
    );
    let tensors = SafeTensors::deserialize(&bytes)?;
    let eight_bit = tensors.names().contains(&"m.codes");
    let coded = |name: &str| -> Result<CodedMoment> {
        Ok(CodedMoment {
            codes: data(&tensors, &format!("{name}.codes"), Dtype::U8)?.to_vec(),
            absmax: floats(&tensors, &format!("{name}.absmax"))?,
        })
    };
    let moments = match eight_bit {
        false => Moments::F32 {
            m: floats(&tensors, "m")?,
            v: floats(&tensors, "v")?,
        },
        true => Moments::EightBit {
            m: coded("m")?,
            v: coded("v")?,
        },
    };
    let state = State {
        step: cut.step,
        params: floats(&tensors, "params")?,
        moments,
    };
    Ok((state, cut))
}

/// A tensor's bytes, if it is of that type.
fn data<'a>(tensors: &SafeTensors<'a>, name: &str, dtype: Dtype) -> Result<&'a [u8]> {
    let tensor = tensors.tensor(name)?;
    let found = tensor.dtype();
    anyhow::ensure!(found == dtype, "{name} is {found:?}, not {dtype:?}");
    Ok(tensor.data())
}

fn floats(tensors: &SafeTensors, name: &str) -> Result<Vec<f32>> {
    Ok(data(tensors, name, Dtype::F32)?
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::time::Duration;

    use safetensors::tensor::TensorView;

    use super::*;

    /// Values that follow from their places.
    fn floats_of(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    /// The library's own function says what the file is.
    #[test]
    fn tensors_are_written_as_safetensors_writes_them() {
        // More than a piece, and none at all.
        let long = floats_of(PIECE / 4 + 3);
        let (short, codes) = (floats_of(5), vec![3_u8; 777]);
        let coded = |len| CodedMoment {
            codes: codes[..len].to_vec(),
            absmax: short.clone(),
        };
        let of = |params: &[f32], moments| State {
            step: 3,
            params: params.to_vec(),
            moments,
        };
        let in_f32 = Moments::F32 {
            m: short.clone(),
            v: long.clone(),
        };
        let in_8_bits = Moments::EightBit {
            m: coded(777),
            v: coded(0),
        };
        let step = HashMap::from([("step".to_owned(), "3".to_owned())]);
        for (state, metadata) in [
            (of(&long, in_f32), None),
            (of(&short, in_8_bits), Some(step)),
        ] {
            let mut tensors = tensors_of(&state);
            let mut written = Vec::new();
            write_tensors(&mut written, &mut tensors, metadata.clone()).unwrap();
            let bytes = tensors.iter().map(|&(name, values)| match values {
                Values::F32(values) => {
                    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    (name, Dtype::F32, bytes)
                }
                Values::U8(values) => (name, Dtype::U8, values.to_vec()),
            });
            let bytes: Vec<(&str, Dtype, Vec<u8>)> = bytes.collect();
            let views = bytes.iter().map(|(name, dtype, bytes)| {
                let shape = vec![bytes.len() * 8 / dtype.bitsize()];
                (*name, TensorView::new(*dtype, shape, bytes).unwrap())
            });
            assert!(written == safetensors::serialize(views, metadata).unwrap());
        }
    }

    #[test]
    fn a_lock_that_fails_is_no_other_run() {
        let folder = Path::new("out");
        let told = |error| match not_locked(folder, error) {
            Failure::Usage(text) => (2, text),
            Failure::World(text) => (4, text),
            _ => panic!("another kind"),
        };
        let (code, text) = told(TryLockError::WouldBlock);
        assert!(code == 2 && text.contains("in use by another"), "{text}");
        let cause = std::io::Error::other("no locks available");
        let (code, text) = told(TryLockError::Error(cause));
        assert!(code == 4 && !text.contains("another qlora-train"), "{text}");
        assert!(
            text.starts_with("locking out/.lock: no locks available; "),
            "{text}"
        );
    }

    #[test]
    fn who_lets_go_of_a_checkpoint_waits_for_it() {
        let written = Arc::new(AtomicBool::new(false));
        let write = {
            let written = written.clone();
            move || {
                std::thread::sleep(Duration::from_millis(200));
                written.store(true, Relaxed);
                Ok(())
            }
        };
        let saving = Saving {
            step: 1,
            writing: Some(std::thread::spawn(write)),
        };
        assert!(!saving.is_done());
        drop(saving);
        assert!(written.load(Relaxed));
    }
}
