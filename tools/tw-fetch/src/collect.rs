//! Collecting through Apify: one search, then the replies of what it found, a few
//! conversations at a time, until there are pairs enough, or nothing is left to ask
//! for, or the money is used up.
//!
//! What to do next follows from the state on disk alone. An interrupted collection
//! therefore goes on by itself, and a finished one needs neither network nor token.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use cli::{App, Failure, Resolved};
use record::Record;
use serde_json::{Value, json};
use settings::{Collection, DataSettings};

use crate::apify::{Api, Limits, Run, Started};
use crate::join::{Joiner, Origin};
use crate::source::{self, Item};
use crate::state::{Event, Plan, State};
use crate::tweet::{Dialect, Tweet};
use crate::wanted::Wanted;

/// How long an interrupted collection waits to hear that its run stops.
const FAREWELL: Duration = Duration::from_millis(1500);

/// Why a collection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Enough,
    NothingLeft,
    MoneyUsedUp,
}

/// Collects; what comes back holds every tweet fetched.
///
/// # Errors
/// Another plan than the folder's (exit 2), and whatever the service or the disk does.
pub fn collect(
    app: &App,
    resolved: &Resolved<DataSettings>,
    folder: &Path,
    adopt: Option<&str>,
    api: impl Fn() -> anyhow::Result<Api>,
    new_joiner: impl Fn() -> Joiner,
) -> anyhow::Result<Joiner> {
    let settings = &resolved.settings.collection;
    let wanted = Wanted::new(resolved)?;
    let mut state = State::open(folder)?;
    let plan = Plan {
        actor: settings.apify.actor.clone(),
        search_queries: settings.search_queries.clone(),
        search_items: settings.apify.search_items,
        sort: settings.apify.sort.clone(),
    };
    match &state.plan {
        Some(old) if *old != plan => return Err(other_plan(old, &plan, folder).into()),
        _ => {}
    }
    if plan.search_queries.is_empty() {
        return Err(Failure::Usage(
            "nothing to search for: give --query, or collection.search_queries in the configuration".into(),
        )
        .into());
    }
    settle_unknown_start(&mut state, folder, adopt)?;
    // Made when first needed: what is on disk already asks nobody for a token.
    let mut collector = None;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    loop {
        let joiner = read_items(&state, &new_joiner)?;
        let work = match next(settings, &wanted, &state, &joiner) {
            Next::Work(work) => work,
            Next::End(end) => {
                say_end(app, settings, &wanted, &state, &joiner, end);
                return Ok(joiner);
            }
        };
        let collector = match &mut collector {
            Some(collector) => collector,
            none => none.insert(Collector {
                app,
                settings,
                api: api()?,
            }),
        };
        // From here on a signal no longer ends the process, but is looked for.
        if app.interrupted()? {
            return Err(interrupted());
        }
        let step = match work {
            Work::GoOn(step) => step,
            Work::Start(input, limits) => {
                if state.plan.is_none() {
                    state.record(Event::Plan { plan: plan.clone() })?;
                }
                let step = state.steps.len();
                state.record(Event::Starting {
                    step,
                    input,
                    limits,
                })?;
                step
            }
        };
        runtime.block_on(collector.run(&mut state, step))?;
    }
}

/// What remains to be done.
enum Next {
    Work(Work),
    End(End),
}

enum Work {
    /// A run was begun: see it through.
    GoOn(usize),
    /// Begin one.
    Start(Value, Limits),
}

fn next(settings: &Collection, wanted: &Wanted, state: &State, joiner: &Joiner) -> Next {
    if let Some(open) = state.steps.iter().position(|step| !step.finished) {
        return Next::Work(Work::GoOn(open));
    }
    if joiner.pairs().filter(|pair| wanted.pair(pair)).count() as u64 >= settings.target_pairs {
        return Next::End(End::Enough);
    }
    let apify = &settings.apify;
    let left = apify.max_cost_usd - state.spent_usd();
    let affordable = if apify.price_per_1000_usd > 0.0 {
        // Saturates, which is what is meant.
        (left.max(0.0) / apify.price_per_1000_usd * 1000.0) as u64
    } else {
        u64::MAX
    };
    if affordable == 0 || left <= 0.0 {
        return Next::End(End::MoneyUsedUp);
    }
    let limits = |wanted: u64| Limits {
        max_items: wanted.min(affordable),
        max_usd: left,
    };
    if state.steps.is_empty() {
        let limits = limits(apify.search_items);
        return Next::Work(Work::Start(
            search_input(settings, limits.max_items),
            limits,
        ));
    }
    let batch = unasked(settings, wanted, state, joiner);
    if batch.is_empty() {
        return Next::End(End::NothingLeft);
    }
    let limits = limits(
        apify
            .replies_per_conversation
            .saturating_mul(batch.len() as u64),
    );
    let input = json!({"conversationIds": batch, "maxItems": limits.max_items, "sort": apify.sort});
    Next::Work(Work::Start(input, limits))
}

/// The actor's input for the search; its own filters save paying for what ours would refuse.
fn search_input(settings: &Collection, max_items: u64) -> Value {
    let filters = &settings.tweet_filters;
    json!({
        "searchTerms": settings.search_queries,
        "maxItems": max_items,
        "sort": settings.apify.sort,
        "tweetLanguage": filters.language,
        "minimumFavorites": filters.min_likes,
        // A tweet that nobody answered makes no pair.
        "minimumReplies": filters.min_replies.max(1),
        "includeSearchTerms": false,
    })
}

/// The next conversations to ask for: those with the most replies first, so that a
/// small budget goes where the pairs are.
fn unasked(settings: &Collection, wanted: &Wanted, state: &State, joiner: &Joiner) -> Vec<String> {
    let asked: HashSet<&str> = asked(state).collect();
    let mut open: Vec<(&Tweet, &str)> = joiner
        .tweets()
        // Replies of conversations already asked for would lead there again.
        .filter(|tweet| !tweet.is_reply && tweet.replies != Some(0) && wanted.tweet(tweet))
        .map(|tweet| (tweet, tweet.conversation_id.as_deref().unwrap_or(&tweet.id)))
        .filter(|(_, conversation)| !asked.contains(conversation))
        .collect();
    open.sort_by(|(a, _), (b, _)| b.replies.cmp(&a.replies).then_with(|| a.id.cmp(&b.id)));
    let mut seen = HashSet::new();
    open.retain(|(_, conversation)| seen.insert(*conversation));
    open.into_iter()
        .map(|(_, c)| c.to_owned())
        .take(settings.apify.conversations_per_run.max(1))
        .collect()
}

/// Conversations whose replies were asked for.
fn asked(state: &State) -> impl Iterator<Item = &str> {
    let inputs = state
        .steps
        .iter()
        .filter_map(|step| step.input.get("conversationIds")?.as_array());
    inputs.flatten().filter_map(Value::as_str)
}

/// Every item on disk.
fn read_items(state: &State, new_joiner: impl Fn() -> Joiner) -> anyhow::Result<Joiner> {
    let mut joiner = new_joiner();
    let mut unreadable = Vec::new();
    for (i, step) in state
        .steps
        .iter()
        .enumerate()
        .filter(|(_, step)| step.bytes > 0)
    {
        let origin = Origin {
            source: "apify",
            collected_at: step.started_at.as_deref(),
        };
        // What was paid for is not given up because one item of it makes no sense.
        let bad = |line: &record::BadLine| {
            let record = Record::parse(&line.raw)
                .map_err(|e| Failure::Input(format!("{}:{}: {e}", line.file, line.line)))?;
            unreadable.push((record, line.error.clone()));
            Ok(())
        };
        let mut no_limit = u64::MAX;
        source::read(
            &state.items_path(i),
            Some(Dialect::Apify),
            &mut no_limit,
            bad,
            |row, _| {
                match row.item {
                    Item::Tweet(tweet) => joiner.add(*tweet, row.record, origin),
                    Item::Pair | Item::Nothing => joiner.refuse(row.record),
                }
                Ok(())
            },
        )?;
    }
    for (record, cause) in unreadable {
        joiner.refuse_unreadable(record, cause);
    }
    Ok(joiner)
}

fn interrupted() -> anyhow::Error {
    Failure::Interrupted(
        "interrupted; what is fetched is kept, and the same command goes on".into(),
    )
    .into()
}

/// A run that was asked for, and no answer on disk: it may exist and cost money. Only
/// its owner can find out.
fn settle_unknown_start(
    state: &mut State,
    folder: &Path,
    adopt: Option<&str>,
) -> anyhow::Result<()> {
    let unknown = state.steps.last().is_some_and(|step| step.run.is_none());
    let step = state.steps.len().saturating_sub(1);
    match (unknown, adopt) {
        (false, None) => Ok(()),
        (false, Some(_)) => Err(Failure::Usage(format!(
            "--adopt-run: {} knows of no run whose id it lacks",
            folder.display()
        ))
        .into()),
        (true, Some("none")) => state.record(Event::Refused { step }),
        (true, Some(run)) => state.record(Event::Started {
            step,
            run: run.to_owned(),
            dataset: None,
            at: None,
        }),
        (true, None) => Err(Failure::World(unknown_start(folder)).into()),
    }
}

fn unknown_start(folder: &Path) -> String {
    format!(
        "{}: a run was asked for and its id never arrived, so one may be running and costing money: look at \
         https://console.apify.com/actors/runs, then run this again with --adopt-run ID, or --adopt-run none \
         if there is none",
        folder.display()
    )
}

fn other_plan(old: &Plan, new: &Plan, folder: &Path) -> Failure {
    let (old, new) = (json!(old), json!(new));
    let changed: Vec<String> = old
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| new.get(key.as_str()) != Some(value))
        .map(|(key, value)| format!("{key} was {value} and is {}", new[key]))
        .collect();
    Failure::Usage(format!(
        "{} holds a collection with other settings: {}; restore them, or collect into another --state",
        folder.display(),
        changed.join("; ")
    ))
}

fn say_end(
    app: &App,
    settings: &Collection,
    wanted: &Wanted,
    state: &State,
    joiner: &Joiner,
    end: End,
) {
    let pairs = joiner.pairs().count();
    let passing = joiner.pairs().filter(|pair| wanted.pair(pair)).count();
    let target = settings.target_pairs;
    app.info(format_args!(
        "{pairs} pairs collected, {passing} of them pass the cheap filters (target {target}); {} runs, about ${:.2}",
        state.steps.len(),
        state.spent_usd()
    ));
    let mut fetched: HashMap<&str, u64> = HashMap::new();
    for tweet in joiner.tweets() {
        if let Some(conversation) = tweet.conversation_id.as_deref().filter(|_| tweet.is_reply) {
            *fetched.entry(conversation).or_default() += 1;
        }
    }
    let asked: HashSet<&str> = asked(state).collect();
    let (mut got, mut there) = (0, 0);
    for tweet in joiner
        .tweets()
        .filter(|tweet| asked.contains(tweet.id.as_str()))
    {
        got += fetched.get(tweet.id.as_str()).copied().unwrap_or(0);
        there += tweet.replies.unwrap_or(0);
    }
    if !asked.is_empty() {
        app.info(format_args!(
            "{} conversations asked for: {got} replies fetched, where the tweets count {there}; X hides some and \
             ends long ones early",
            asked.len()
        ));
    }
    match end {
        End::Enough => {}
        End::NothingLeft => app.warn(
            "the target was not reached and no conversation is left to ask for: in a new --state, add queries or \
             raise collection.apify.search_items; or loosen the filters",
        ),
        End::MoneyUsedUp => app.warn(format_args!(
            "the target was not reached within collection.apify.max_cost_usd = {}: raise it and run this again to go on",
            settings.apify.max_cost_usd
        )),
    }
}

/// The part that talks to the service.
struct Collector<'a> {
    app: &'a App,
    settings: &'a Collection,
    api: Api,
}

impl Collector<'_> {
    /// Sees the run of `step` through, wherever it stands.
    async fn run(&self, state: &mut State, step: usize) -> anyhow::Result<()> {
        let run = match state.steps[step].run.clone() {
            None => self.start(state, step).await?,
            Some(id) => self.go_on(state, step, &id).await?,
        };
        let run = self.wait(state, step, run).await?;
        if run.status != "SUCCEEDED" {
            self.app.warn(format_args!(
                "the run {} ended as {}; what it fetched is taken",
                run.id,
                run.verdict()
            ));
        }
        let items = self.fetch(state, step, &run).await?;
        self.finish(state, step, &run, items).await
    }

    /// A run of an earlier process; one that we had stopped is set going again.
    async fn go_on(&self, state: &mut State, step: usize, id: &str) -> anyhow::Result<Run> {
        let look = self.unless_interrupted(self.api.look(id)).await;
        let run = look.with_context(|| {
            format!("going on with the run {id} (Apify deletes old runs: then begin with another --state)")
        })?;
        let run = run.ok_or_else(interrupted)?;
        if !state.steps[step].interrupted || state.steps[step].bytes > 0 {
            return Ok(run);
        }
        let run = self.wait(state, step, run).await?;
        if run.status != "ABORTED" {
            return Ok(run);
        }
        self.app.info(format_args!(
            "the run {id} was stopped last time; it goes on"
        ));
        match self.seen_through(self.api.resurrect(id)).await? {
            Ok(run) => Ok(run),
            Err(error) => {
                self.app
                    .warn(format_args!("the run {id} cannot go on: {error:#}"));
                Ok(run)
            }
        }
    }

    async fn start(&self, state: &mut State, step: usize) -> anyhow::Result<Run> {
        let (input, limits) = {
            let step = &state.steps[step];
            (
                step.input.clone(),
                step.limits.context("a step without limits")?,
            )
        };
        let what = match input.get("conversationIds").and_then(Value::as_array) {
            None => "search".to_owned(),
            Some(ids) => format!("replies of {} conversations", ids.len()),
        };
        self.app.info(format_args!(
            "run {}: {what}, at most {} items and ${:.2}",
            step + 1,
            limits.max_items,
            limits.max_usd
        ));
        let start = self.api.start(&self.settings.apify.actor, &input, limits);
        match self.seen_through(start).await? {
            Ok(run) => {
                state.record(Event::Started {
                    step,
                    run: run.id.clone(),
                    dataset: run.default_dataset_id.clone(),
                    at: run.started_at.clone(),
                })?;
                Ok(run)
            }
            Err(Started::Refused(error)) => {
                state.record(Event::Refused { step })?;
                Err(if self.app.interrupted()? {
                    interrupted()
                } else {
                    error
                })
            }
            Err(Started::Unknown(error)) => {
                let said = format!("{error:#}");
                Err(
                    Failure::World(format!("{said}\n--state {}", unknown_start(state.folder())))
                        .into(),
                )
            }
        }
    }

    /// Waits for the run to end. Interrupted, it asks the run to stop first.
    async fn wait(&self, state: &mut State, step: usize, mut run: Run) -> anyhow::Result<Run> {
        let progress = self.app.progress("waiting for Apify, seconds", None);
        let begun = Instant::now();
        while !run.is_over() {
            let asked = Instant::now();
            let Some(now) = self.unless_interrupted(self.api.wait(&run.id)).await? else {
                drop(progress);
                return Err(self.stop(state, step, &run.id).await);
            };
            run = now;
            progress.set(begun.elapsed().as_secs());
            // The service waits up to a minute itself; one that answers at once is not pestered.
            let pause = Duration::from_secs(1).saturating_sub(asked.elapsed());
            if !run.is_over() {
                let pause = async {
                    tokio::time::sleep(pause).await;
                    anyhow::Ok(())
                };
                self.unless_interrupted(pause).await?;
            }
        }
        Ok(run)
    }

    async fn stop(&self, state: &mut State, step: usize, run: &str) -> anyhow::Error {
        self.app
            .info(format_args!("interrupted: asking the run {run} to stop"));
        let stopped = match state.record(Event::Interrupted { step }) {
            Ok(()) => {
                // Once, and soon: whoever interrupts does not want to wait for this either.
                self.api.give_up();
                match tokio::time::timeout(FAREWELL, self.api.abort(run)).await {
                    Ok(answer) => answer,
                    Err(_) => Err(anyhow::anyhow!(
                        "no answer for {} s",
                        FAREWELL.as_secs_f64()
                    )),
                }
            }
            Err(error) => Err(error),
        };
        let how = match stopped {
            Ok(_) => format!("the run {run} was asked to stop"),
            Err(error) => format!(
                "the run {run} may still be running ({error:#}); see https://console.apify.com"
            ),
        };
        Failure::Interrupted(format!(
            "interrupted; {how}; the same command goes on from here"
        ))
        .into()
    }

    /// Fetches what is not on disk yet; the number of items in all.
    async fn fetch(&self, state: &mut State, step: usize, run: &Run) -> anyhow::Result<u64> {
        let dataset = run
            .default_dataset_id
            .clone()
            .or_else(|| state.steps[step].dataset.clone());
        let dataset = dataset.with_context(|| format!("the run {} names no dataset", run.id))?;
        let limit = self.settings.apify.page_size.max(1);
        let progress = self.app.progress("items", None);
        loop {
            let offset = state.steps[step].next_offset;
            let page = self
                .unless_interrupted(self.api.page(&dataset, offset, limit))
                .await?;
            let page = page.ok_or_else(interrupted)?;
            let bytes = state.append(step, &page.lines)?;
            // By what was asked for, not by what came: empty items are left out of a page.
            let next_offset = offset.saturating_add(limit);
            state.record(Event::Page {
                step,
                next_offset,
                bytes,
            })?;
            progress.set(
                page.total
                    .map_or(next_offset, |total| total.min(next_offset)),
            );
            let more = page
                .total
                .map_or(!page.lines.trim().is_empty(), |total| next_offset < total);
            if !more {
                break;
            }
        }
        let text = std::fs::read_to_string(state.items_path(step))?;
        Ok(text.lines().filter(|line| !line.trim().is_empty()).count() as u64)
    }

    /// Books what the run cost and whether it was of use.
    async fn finish(
        &self,
        state: &mut State,
        step: usize,
        run: &Run,
        items: u64,
    ) -> anyhow::Result<()> {
        // Figures settle some seconds after the end, so the count of items has a say.
        let settled = match self.unless_interrupted(self.api.look(&run.id)).await {
            Ok(now) => now.ok_or_else(interrupted)?,
            Err(_) => run.clone(),
        };
        let counted = items as f64 / 1000.0 * self.settings.apify.price_per_1000_usd;
        let usd = settled
            .usage_total_usd
            .unwrap_or(0.0)
            .max(run.usage_total_usd.unwrap_or(0.0))
            .max(counted);
        let status = run.status.clone();
        if items == 0 && status != "SUCCEEDED" {
            state.record(Event::Failed { step, status, usd })?;
            return Err(Failure::World(format!(
                "the run {} ended as {} and left nothing; run this again to try once more, perhaps with a smaller \
                 collection.apify.conversations_per_run",
                run.id,
                run.verdict()
            ))
            .into());
        }
        self.app.info(format_args!(
            "run {}: {items} items, about ${usd:.2}",
            step + 1
        ));
        state.record(Event::Finished {
            step,
            status,
            items,
            usd,
        })
    }

    /// What `work` gives, or nothing where the user wants it to end.
    async fn unless_interrupted<T>(
        &self,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<Option<T>> {
        tokio::pin!(work);
        loop {
            if self.app.interrupted()? {
                return Ok(None);
            }
            if let Some(done) = self.for_a_moment(work.as_mut()).await {
                return done.map(Some);
            }
        }
    }

    /// What `work` gives, which costs money or undoes something: a request under way is
    /// waited for, so that its outcome is known; after an interruption none is repeated.
    async fn seen_through<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        tokio::pin!(work);
        let mut rounds = 0_u32;
        loop {
            if let Some(done) = self.for_a_moment(work.as_mut()).await {
                return Ok(done);
            }
            if self.app.interrupted()? {
                match rounds {
                    0 => self.api.give_up(),
                    // It was no wait between attempts, which would have ended.
                    1 => self
                        .app
                        .info("waiting for the answer to a request that may cost money"),
                    _ => {}
                }
                rounds += 1;
            }
        }
    }

    /// Works on for a tenth of a second, and tells what had to be tried again.
    async fn for_a_moment<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let done = tokio::time::timeout(Duration::from_millis(100), work)
            .await
            .ok();
        for retry in self.api.retries() {
            self.app.warn(retry);
        }
        done
    }
}
