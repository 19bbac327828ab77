// Training: what runs, its numbers, curves and pictures as they come; stop, continue, and what waits.
import { button, chip, command, ended, get, h, labelled, lasting, number, post, problem, Refused, runs, say, section, show, studio, table, trying, url, watch } from "./core.js";

const EVERY = 2000; // milliseconds between looks at curves and pictures, more where a look takes long
const bytes = (count) => (count > 1e9 ? `${number(count / 1e9)} GB` : `${number(Math.round(count / 1e6))} MB`);

export const training = async (page, go) => {
  page.append(h("h1", {}, "Training"));
  const chooser = runs("Run", go);
  if (!chooser) return page.append(h("p", {}, "Nothing has been started yet. ", h("a", { href: "#settings" }, "Make a config"), " first."));
  const name = studio.run;
  const [status, notes, figures, curves, drawn, use, timings, queue, results] = Array.from({ length: 9 }, () => h("div", {}));
  const log = h("pre", { class: "log", tabindex: "0", role: "region", "aria-label": "Output of the command" });
  const asked = h("div", {});
  const ask = async () => {
    const job = studio.now.runs.find((run) => run.name === name)?.job;
    if (!job) return say("nothing has been run here yet");
    const { text } = await get("helpful", { job });
    asked.replaceChildren(command(text, "What to show to somebody who helps"));
  };
  const logged = h("details", {}, h("summary", {}, "Output of the command"), log, h("p", { class: "rowed" }, button("What to show to somebody who helps", ask), h("small", {}, "without captions, prompts and places of folders; read it before you share it")), asked);
  curves.className = "charts";
  const told = h("div", { "aria-live": "polite" });
  drawn.addEventListener("click", trying(async (event) => {
    const picture = event.target.closest(".pick")?.querySelector("img");
    if (!picture) return;
    const found = await get("drawn", { run: name, told: picture.alt });
    const settings = Object.entries(found.settings).map(([key, value]) => [key, value === null ? "–" : String(value)]);
    picture.closest(".prompt").append(told);
    told.replaceChildren(h("details", { open: true }, h("summary", {}, `How it was drawn: ${picture.alt}`), table("Settings of the picture", ["setting", "value"], settings), command(found.command, "Draws it again"), h("p", {}, h("a", { href: url("run-file", { run: name, file: found.file }), target: "_blank", rel: "noopener" }, "The picture itself"), ", which holds its settings for A1111 and ComfyUI.")));
  }));
  const toHub = hub(name);
  page.append(h("div", { class: "rowed" }, chooser), status, notes, figures, section("Pictures", drawn), section("Curves", curves), section("Result", results, use, toHub), section("Where the time went", timings), section("Queue", queue), logged);
  let stamps = "", looked = 0, took = 0, waiting = null;
  const seen = {};

  const look = async () => {
    const began = Date.now();
    const found = await get("run", { name });
    [looked, took] = [Date.now(), Date.now() - began];
    const parts = { notes, figures, curves, pictures: drawn, use, timings };
    for (const [part, place] of Object.entries(parts)) {
      const html = found.html[part] ?? "";
      // What somebody is reading with the pointer or the keyboard is not replaced under them.
      if (seen[part] === html || (seen[part] && (place.matches(":hover") || place.contains(document.activeElement)))) continue;
      seen[part] = html;
      show(place, html);
    }
    drawn.closest("section").hidden = !drawn.innerHTML;
    curves.closest("section").hidden = !curves.innerHTML;
    timings.closest("section").hidden = !timings.innerHTML;
    results.replaceChildren(...outcome(name, found));
    toHub.hidden = !found.result;
    results.closest("section").hidden = !results.textContent && !use.innerHTML;
  };
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(trying(look), Math.max(0, EVERY + 10 * took - (Date.now() - looked)));
  };
  const output = trying(async (job) => {
    if (!job || !logged.open) return;
    const { output: text } = await get("output", { job });
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    log.textContent = text;
    if (atEnd) log.scrollTop = log.scrollHeight;
  });
  let last = "";
  watch((now) => {
    const run = now.runs.find((other) => other.name === name);
    if (!run) return;
    const job = now.jobs.find((other) => other.id === run.job);
    const drawing = JSON.stringify([run, job && { ...job, memory: 0 }]);
    if (drawing !== last || !status.children.length) {
      last = drawing;
      const focused = document.activeElement?.dataset?.does;
      status.replaceChildren(...state(run, job));
      if (focused) status.querySelector(`[data-does="${focused}"]`)?.focus();
    }
    queue.replaceChildren(...line(now.jobs));
    if (String(run.stamps) !== stamps) {
      stamps = String(run.stamps);
      soon();
    }
    output(run.job);
  });
  logged.addEventListener("toggle", () => output(studio.now.runs.find((run) => run.name === name)?.job));
};

const state = (run, job) => {
  const goes = job?.state === "running" || job?.state === "queued";
  const holds = run.state === "paused" || run.state === "pausing";
  const stops = goes ? null : run.check.problem;
  const done = run.step ?? 0;
  const total = run.steps;
  const over = job?.done === job?.total && run.step; // what came before the steps
  const phase = job?.state === "running" ? (over ? "steps" : job.what ?? "starting") : null;
  const [at, of] = phase && phase !== "steps" ? [job.done, job.total] : [done, total];
  const facts = [
    phase && phase !== "steps" ? `${phase} ${number(job.done)} of ${number(job.total)}` : null,
    run.step ? `step ${number(done)}${total ? ` of ${number(total)}` : ""}` : null,
    run.loss !== null ? `loss ${number(run.loss)}` : null,
    run.speed ? `${number(run.speed)} pictures/s` : null,
    run.left !== undefined && !holds ? `${lasting(run.left)} left` : null,
    job?.memory ? `${bytes(job.memory)} of memory` : null,
  ].filter(Boolean);
  const stop = (atOnce) => async () => {
    if (atOnce && !confirm("End it at once? The steps since the last checkpoint are lost.")) return;
    await post("stop", { job: job.id, at_once: atOnce });
    say(atOnce ? "ended" : "it saves a checkpoint and stops");
  };
  const now = (what) => async () => {
    const { said, command: same } = await post("now", { run: run.name, what });
    say(`${said} (${same})`);
  };
  const start = async () => {
    await post("train", { name: run.name });
    say("it is in the queue");
  };
  return [
    h("p", { class: "state" }, chip(run.state), " ", facts.join(" · ")),
    of ? h("progress", { max: String(of), value: Math.min(at ?? 0, of), "aria-label": phase ?? "steps" }) : null,
    job?.state === "running" && job.says && run.state !== "paused" ? h("p", { class: "muted says" }, job.says) : null,
    run.state === "paused" ? h("p", { class: "muted" }, "Its step is saved. It holds its memory until it goes on; what waits in the queue waits for it.") : null,
    job?.problem ? problem(job.problem, run.name) : null,
    stops ? h("div", {}, h("p", {}, "The last check found what stops it. Mend it and ", h("a", { href: "#settings" }, "check again"), "; then it can be started."), problem(stops, run.name)) : null,
    h(
      "p",
      { class: "rowed" },
      goes
        ? [
            holds ? button("Go on", now("continue"), { class: "main", "data-does": "pause" }) : job.state === "running" ? button("Pause", now("pause"), { class: "main", "data-does": "pause" }) : null,
            button(job.state === "queued" ? "Leave the queue" : "Save and stop", stop(false), { "data-does": "stop" }),
            // Asked for while it is loaded they come after its first step.
            job.state === "running" ? [holds ? null : button("Save now", now("save"), { "data-does": "save" }), button("Pictures now", now("sample"), { "data-does": "sample" }), button("End at once", stop(true), { "data-does": "end" })] : null,
          ]
        : total && done >= total
          ? h("span", { class: "muted" }, "To go on, give it more steps:")
          : button(run.step ? "Continue" : "Start", start, { class: "main", "data-does": "start", disabled: Boolean(stops) }),
      h("a", { href: "#settings" }, "Settings"),
      h("a", { href: "#try" }, "Try prompts"),
      h("a", { href: "#settings", onclick: () => (studio.copied = run.name) }, "New run with these settings"),
    ),
    job ? command(job.command) : null,
  ].filter(Boolean);
};

const outcome = (name, found) => {
  const make = (kind) => async () => {
    const job = await post("export", { run: name, kind });
    say(`in the queue: ${job.command}`);
  };
  const adapter = found.files.some((file) => file.name === "pytorch_lora_weights.safetensors");
  return [
    found.checkpoints.length ? h("p", {}, `Checkpoints at steps ${found.checkpoints.map(number).join(", ")}.`) : null,
    h(
      "p",
      { class: "rowed" },
      adapter ? button("One file for ComfyUI, A1111, Forge", make("kohya")) : null,
      found.model ? button("One file for ComfyUI, A1111, Forge", make("single")) : null,
      found.report ? h("a", { href: url("run-file", { run: name, file: "report.html" }), target: "_blank", rel: "noopener" }, "Report") : null,
      found.report ? h("a", { href: url("bundle", { run: name }), download: true }, "Everything to share, as a .zip") : null,
    ),
    found.files.length ? h("ul", {}, found.files.map((file) => h("li", {}, h("a", { href: url("run-file", { run: name, file: file.name }), download: true }, file.name), ` ${bytes(file.bytes)}`))) : null,
  ].filter(Boolean);
};

/** The copy on the hub: what it would do comes first. */
const hub = (name) => {
  const place = h("div", {});
  const id = h("input", { type: "text", autocomplete: "off", spellcheck: "false", placeholder: "you/name" });
  const hidden = h("input", { type: "checkbox", checked: true });
  const sent = () => ({ run: name, id: id.value, private: hidden.checked });
  const look = async () => {
    place.replaceChildren();
    try {
      const { told, token, command: same } = await get("hub", sent());
      place.replaceChildren(h("ul", { "aria-label": "What it will do" }, told.map((line) => h("li", {}, line))), command(same), h("p", { class: "rowed" }, button("Push it now", push, { class: "main", disabled: !token })));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      place.replaceChildren(problem(error));
    }
  };
  const push = async () => {
    const job = await post("push", sent());
    place.replaceChildren(h("p", { class: "muted" }, "It is on its way…"));
    try {
      await ended(job);
      const { output } = await get("output", { job: job.id });
      place.replaceChildren(h("p", {}, output.trim().split("\n").at(-1)));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      place.replaceChildren(problem(error));
    }
  };
  for (const field of [id, hidden]) field.addEventListener("change", trying(look));
  const made = h("details", {}, h("summary", {}, "To the Hugging Face hub"), h("div", { class: "rowed" }, labelled("Repository", id, "empty: the name of the run, in your account"), h("label", { class: "check" }, hidden, "private, if it is new")), place);
  made.addEventListener("toggle", () => made.open && trying(look)());
  return made;
};

const line = (jobs) => {
  const shown = jobs.filter((job) => job.state === "running" || job.state === "queued").reverse();
  if (!shown.length) return [h("p", { class: "muted" }, "Nothing runs and nothing waits. Trainings wait for one another and start by themselves.")];
  return [
    h(
      "ol",
      { class: "queue" },
      shown.map((job) =>
        h(
          "li",
          {},
          chip(job.state),
          ` ${job.kind} ${job.name} `,
          job.state === "queued" ? [button("↑", () => post("move", { job: job.id, up: true }), { "aria-label": `${job.name} earlier` }), button("↓", () => post("move", { job: job.id }), { "aria-label": `${job.name} later` })] : null,
          button("Stop", () => post("stop", { job: job.id }), { "aria-label": `Stop ${job.kind} ${job.name}` }),
        ),
      ),
    ),
  ];
};
