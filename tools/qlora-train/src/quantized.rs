//! The base in 4 bits, kept on the disk: quantising an 8B model takes minutes,
//! loading the result seconds, and every run on the same base uses the same.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use anyhow::{Context, Result};
use cli::{App, Failure};
use engine::{Device, HostMatrix};
use qwen3::Checkpoint;

use crate::disk;
use crate::memory::Size;

/// Writes the base to `folder` in bitsandbytes' form, where the disk has room for it
/// and for `beside` bytes that come after it.
pub fn save(
    app: &App,
    base: &Checkpoint,
    folder: &Path,
    device: &Device,
    beside: u64,
) -> Result<()> {
    write(app, base, folder, device, beside)?;
    app.info(format_args!(
        "the base in 4 bits is in {}",
        folder.display()
    ));
    Ok(())
}

/// Says what [`save`] would write, and whether there is room for it.
///
/// # Errors
/// If there is none.
pub fn preview(app: &App, base: &Checkpoint, folder: &Path) -> Result<()> {
    let bytes = room(base, folder, 0)?;
    app.info(format_args!(
        "the base in 4 bits would take {} in {}; --dry-run writes nothing",
        Size(bytes as usize),
        folder.display()
    ));
    Ok(())
}

/// The base in 4 bits out of `cache`, where it lies under its fingerprint;
/// made there first if need be. A cache that cannot be written is no reason not
/// to train: then, and where `cache` is empty or the base is in 4 bits, there is none.
pub fn cached(
    app: &App,
    base: &Checkpoint,
    (cache, fingerprint): (&str, &str),
    device: &Device,
    beside: u64,
) -> Option<Checkpoint> {
    if cache.is_empty() || base.is_quantized() {
        return None;
    }
    find_or_make(app, base, (Path::new(cache), fingerprint), device, beside)
        .inspect_err(|error| {
            app.warn(format_args!(
                "the 4-bit base cannot be kept ({error:#}); `model.cache: \"\"` turns that off"
            ));
        })
        .ok()
}

fn find_or_make(
    app: &App,
    base: &Checkpoint,
    (cache, fingerprint): (&Path, &str),
    device: &Device,
    beside: u64,
) -> Result<Checkpoint> {
    let folder = cache.join(fingerprint);
    fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
    // A second run that starts meanwhile waits for the first, and finds it done.
    let lock_path = cache.join(format!("{fingerprint}.lock"));
    let lock = File::create(&lock_path).with_context(|| lock_path.display().to_string())?;
    let locked = match lock.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            app.info(format_args!(
                "another run is at the base in 4 bits in {}: waiting for it",
                folder.display()
            ));
            lock.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
    };
    locked.with_context(|| format!("locking {}", lock_path.display()))?;
    // What the folder held when it was made: a flipped bit would train on, unseen.
    let sum_path = cache.join(format!("{fingerprint}.sum"));
    if folder.exists() {
        let kept = Checkpoint::open(&folder).map_err(anyhow::Error::from);
        let as_made = kept.and_then(|kept| {
            let is = kept.fingerprint()?;
            let was = fs::read_to_string(&sum_path).unwrap_or_default();
            anyhow::ensure!(
                is == was.trim(),
                "{} is not as it was made",
                folder.display()
            );
            Ok(kept)
        });
        match as_made {
            Ok(kept) => {
                app.detail(format_args!(
                    "the base in 4 bits comes from {}",
                    folder.display()
                ));
                return Ok(kept);
            }
            Err(error) => {
                app.warn(format_args!("{error:#}: made anew"));
                fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
            }
        }
    }
    write(app, base, &folder, device, beside)?;
    let kept = Checkpoint::open(&folder)?;
    jsonl::write_atomically(&sum_path, format!("{}\n", kept.fingerprint()?).as_bytes())?;
    app.detail(format_args!(
        "the base in 4 bits is kept in {}",
        folder.display()
    ));
    Ok(kept)
}

/// Bytes to be written, with those `beside`; refuses a disk that has no room for them.
fn room(base: &Checkpoint, folder: &Path, beside: u64) -> Result<u64> {
    let (needed, free) = (base.quantized_bytes()? + beside, disk::free(folder)?);
    if needed > free {
        let (needed, free) = (Size(needed as usize), Size(free as usize));
        let folder = folder.display();
        let cause =
            format!("{folder}: the disk has {free} free, and {needed} are needed: make room there");
        return Err(Failure::World(cause).into());
    }
    Ok(needed)
}

fn write(app: &App, base: &Checkpoint, folder: &Path, device: &Device, beside: u64) -> Result<()> {
    room(base, folder, beside)?;
    let layers = base.config().layers as u64;
    let progress = app.progress("quantising layers", Some(layers));
    let quantize = |matrix: &HostMatrix| device.quantize(matrix);
    Ok(base.save_quantized(folder, quantize, |done| progress.set(done as u64))?)
}
