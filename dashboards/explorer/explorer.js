// The Pareto explorer: draws the trials of one or several studies from the data in the page.
// Fetches and stores nothing. Computes fronts and hypervolume shares for the selected axes.
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SEVERAL = D.studies.length > 1;
const TRIALS = D.studies.flatMap((study, s) => study.trials.map((t) => ({ ...t, s, study })));
const groupOf = (t) => (SEVERAL ? t.study.name : t.method);
const state = { x: D.axes.x[0], y: D.axes.y[0], bars: "front", early: true, published: true,
                budget: null, off: new Set(), pins: [], at: null };

// -- values ---------------------------------------------------------------------------------

// name: an objective, or "certified_top1" for top-1 on the held-out images
function value(t, name) {
  if (name === "certified_top1") return t.certified ? t.certified.top1 : null;
  const v = t.values[name];
  return v === undefined ? null : v;
}
function interval(t, name) {
  if (name === "certified_top1") return t.certified ? [t.certified.low, t.certified.high] : null;
  return name === "top1" && t.low !== null ? [t.low, t.high] : null;
}
const has = (t) => value(t, state.x) !== null && value(t, state.y) !== null;
const shown = (t) => has(t) && !state.off.has(groupOf(t)) && (state.early || t.state === "finished")
  && (state.budget === null || value(t, state.x) <= state.budget);
const digits = (v, n = 4) => (v === null || v === undefined ? "" : Number(v).toPrecision(n).replace(/\.?0+$/, (z) => (z.includes(".") ? "" : z)));
const fixed = (v, n = 2) => (v === null || v === undefined ? "" : v.toFixed(n));

// the label of gmacs contains its unit
const axis = (name) => (D.names[name].includes("GMACs") ? D.names[name] : `${D.names[name]}, ${D.units[name]}`);

// non-dominated trials in order of increasing cost and accuracy
function front(trials) {
  const known = trials.filter((t) => t.state === "finished" && has(t));
  known.sort((a, b) => value(a, state.x) - value(b, state.x) || value(b, state.y) - value(a, state.y) || a.number - b.number);
  const out = [];
  let best = -Infinity;
  for (const t of known) if (value(t, state.y) > best) { best = value(t, state.y); out.push(t); }
  return out;
}
// area between a front and the reference point: dense accuracy - 10 points, dense cost
function hypervolume(trials, dense) {
  if (!dense || !has(dense)) return null;
  const right = value(dense, state.x), floor = value(dense, state.y) - 10;
  const inside = front(trials.filter((t) => has(t) && value(t, state.x) < right && value(t, state.y) > floor));
  let area = 0;
  inside.forEach((t, i) => {
    const to = i + 1 < inside.length ? value(inside[i + 1], state.x) : right;
    area += (to - value(t, state.x)) * (value(t, state.y) - floor);
  });
  return area;
}
const denseOf = (s) => TRIALS.find((t) => t.s === s && t.dense && t.state === "finished") || null;

// -- the plot -------------------------------------------------------------------------------

const SYMBOLS = { o: "circle", s: "square", "^": "triangle-up", D: "diamond", v: "triangle-down",
                  P: "cross", "<": "triangle-left", X: "x", ">": "triangle-right", h: "hexagon" };
const GLYPHS = { o: "●", s: "■", "^": "▲", D: "◆", v: "▼", P: "✚", "<": "◀", X: "✖", ">": "▶", h: "⬢" };
const HOLLOW = { o: "○", s: "□", "^": "△", D: "◇", v: "▽" };

const lookOf = (t) => (SEVERAL ? { ...D.styles[t.method], colour: t.study.colour }
                               : D.styles[t.method]);
function hover(t) {
  const lines = [`<b>trial ${t.number}${SEVERAL ? " of " + t.study.name : ""}</b>${t.knee ? ", knee" : ""}`, wrap(t.recipe)];
  const y = interval(t, state.y);
  lines.push(`${D.names[state.y]}: ${fixed(value(t, state.y))} %${y ? ` (${fixed(y[0], 1)}–${fixed(y[1], 1)})` : ""}`);
  lines.push(`${D.names[state.x]}: ${digits(value(t, state.x))}`);
  if (t.state === "raced_out") lines.push(`estimate; stopped after ${t.images} images`);
  return lines.join("<br>");
}
function wrap(text, width = 60) {
  const out = [];
  for (const word of escaped(text).split(" ")) {
    if (out.length && out[out.length - 1].length + word.length < width) out[out.length - 1] += " " + word;
    else out.push(word);
  }
  return out.join("<br>");
}
const escaped = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" }[c]));

function marks(trials, look, more = {}) {
  const bars = trials.map((t) => interval(t, state.y));
  const up = trials.map((t, i) => (bars[i] ? bars[i][1] - value(t, state.y) : 0));
  const down = trials.map((t, i) => (bars[i] ? value(t, state.y) - bars[i][0] : 0));
  return {
    type: "scatter", mode: "markers", x: trials.map((t) => value(t, state.x)), y: trials.map((t) => value(t, state.y)),
    text: trials.map(hover), hovertemplate: "%{text}<extra></extra>", customdata: trials.map((t) => TRIALS.indexOf(t)),
    error_y: { type: "data", symmetric: false, array: up, arrayminus: down, thickness: 1, width: 2, visible: !!more.bars, color: "#777" },
    showlegend: false, ...look, ...more.trace,
  };
}
function line(trials, look, name) {
  const last = Math.max(...TRIALS.filter((t) => shown(t) && t.s === trials[0].s).map((t) => value(t, state.x)));
  const x = trials.map((t) => value(t, state.x)), y = trials.map((t) => value(t, state.y));
  if (x.length) { x.push(Math.max(last, x[x.length - 1])); y.push(y[y.length - 1]); }
  return { type: "scatter", mode: "lines", x, y, line: { shape: "hv", ...look }, name, hoverinfo: "skip", showlegend: true };
}

function traces() {
  const out = [], seen = TRIALS.filter(shown);
  for (const early of [true, false]) {
    const groups = new Map();
    for (const t of seen) {
      if ((t.state === "raced_out") !== early || t.dense) continue;
      const key = `${t.s} ${t.method}`;
      groups.set(key, [...(groups.get(key) || []), t]);
    }
    for (const trials of groups.values()) {
      const look = lookOf(trials[0]);
      const symbol = SYMBOLS[look.shape] + (look.control ? "-open" : "");
      out.push(marks(trials, {
        marker: { symbol, color: look.colour, size: early ? 5 : 9, opacity: early ? 0.4 : 0.9,
                  line: { width: look.control ? 1.4 : 0.7, color: look.control ? look.colour : "#222" } },
      }, { bars: state.bars === "all" }));
    }
  }
  D.studies.forEach((study, s) => {
    const own = TRIALS.filter((t) => t.s === s && (state.budget === null || !has(t) || value(t, state.x) <= state.budget));
    const members = front(own);
    const colour = SEVERAL ? study.colour : "#222222";
    if (!(SEVERAL && state.off.has(study.name))) {
      if (members.length) out.push(line(members, { color: colour, width: 2, dash: SEVERAL ? D.dashes[s % D.dashes.length] : "solid" },
                                        SEVERAL ? `front of ${study.name}` : "front"));
      if (state.bars === "front") {
        out.push(marks(members.filter(shown), { marker: { size: 0.1, opacity: 0 }, hoverinfo: "skip", hovertemplate: null }, { bars: true }));
      }
      const plain = front(own.filter((t) => t.control));
      if (!SEVERAL && plain.length > 1) out.push(line(plain, { color: D.control_front, width: 2, dash: "dash" }, "front of the controls"));
    }
    const dense = denseOf(s);
    if (dense && shown(dense)) {
      out.push(marks([dense], { marker: { symbol: "star", size: 16, color: SEVERAL ? colour : D.dense, line: { width: 1, color: "#222" } } },
                     { bars: state.bars !== "none", trace: { showlegend: !SEVERAL, name: "dense model" } }));
    }
    const knee = own.filter((t) => t.knee && shown(t));
    if (knee.length) out.push(marks(knee, { marker: { symbol: "circle-open", size: 20, color: "#222", line: { width: 2 } } },
                                    { trace: { showlegend: !SEVERAL, name: "knee", hoverinfo: "skip", hovertemplate: null } }));
  });
  if (state.published) {
    for (const trained of [false, true]) {
      const some = D.studies.flatMap((study) => study.published).filter((p) => p.trained === trained
        && p.values[state.x] !== undefined && p.values[state.y] !== undefined
        && (state.budget === null || p.values[state.x] <= state.budget));
      if (!some.length) continue;
      out.push({
        type: "scatter", mode: "markers", x: some.map((p) => p.values[state.x]), y: some.map((p) => p.values[state.y]),
        name: trained ? "published, trained for it" : "published, not trained", showlegend: true,
        text: some.map((p) => `${wrap(p.label)}<br>${wrap(p.text)}`), hovertemplate: "%{text}<extra></extra>",
        marker: { symbol: trained ? "asterisk-open" : "x-thin-open", size: 11, color: some.map((p) => (D.styles[p.method] || { colour: "#222" }).colour),
                  line: { width: trained ? 3 : 2 } },
      });
    }
  }
  state.pins.forEach((t, i) => {
    if (!has(t)) return;
    out.push({ type: "scatter", mode: "markers+text", x: [value(t, state.x)], y: [value(t, state.y)], text: ["AB"[i]], textposition: "top center",
               textfont: { size: 15, color: "#000" }, hoverinfo: "skip", showlegend: false,
               marker: { symbol: "square-open", size: 18, color: "#000", line: { width: 2.5 } } });
  });
  if (state.at && shown(state.at)) {
    out.push({ type: "scatter", mode: "markers", x: [value(state.at, state.x)], y: [value(state.at, state.y)], hoverinfo: "skip", showlegend: false,
               marker: { symbol: "circle-open", size: 24, color: "#0072B2", line: { width: 3 } } });
  }
  return out;
}
function draw() {
  const layout = {
    margin: { l: 60, r: 10, t: 10, b: 50 }, hovermode: "closest", dragmode: "pan", uirevision: `${state.x} ${state.y}`,
    xaxis: { title: { text: axis(state.x) }, zeroline: false, showgrid: true, gridcolor: "#eee", linecolor: "#999", ticks: "outside" },
    yaxis: { title: { text: axis(state.y) }, zeroline: false, gridcolor: "#eee", linecolor: "#999", ticks: "outside", range: span() },
    legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom" },
    hoverlabel: { align: "left", bgcolor: "#fff", bordercolor: "#444", font: { color: "#111" } }, font: { family: "system-ui, sans-serif", size: 13 },
  };
  Plotly.react("plot", traces(), layout, { responsive: true, displaylogo: false, scrollZoom: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
}
// initial range: at most 30 points below dense, but always the whole front. One trial at 3 % would
// compress all relevant differences.
function span() {
  const ys = TRIALS.filter(shown).flatMap((t) => interval(t, state.y) && t.state === "finished" ? interval(t, state.y) : [value(t, state.y)]);
  if (!ys.length) return undefined;
  const top = Math.max(...ys), dense = Math.min(...D.studies.map((_, s) => { const d = denseOf(s); return d && has(d) ? value(d, state.y) : top; }));
  const members = D.studies.flatMap((_, s) => front(TRIALS.filter((t) => t.s === s && shown(t))));
  const ends = members.map((t) => (interval(t, state.y) || [value(t, state.y)])[0]);
  const low = Math.max(Math.min(...ys), Math.min(dense - 30, ...ends)), room = 0.06 * Math.max(top - low, 1);
  return [low - room, top + room];
}

// -- groups, table, pins --------------------------------------------------------------------

function groups() {
  const names = [...new Set(TRIALS.map(groupOf))];
  const box = $("groups");
  [...box.querySelectorAll("label")].forEach((l) => l.remove());
  $("groups-head").textContent = SEVERAL ? "Studies and their hypervolume" : "Methods and their share of the front's hypervolume";
  const rows = names.map((name) => {
    const some = TRIALS.filter((t) => groupOf(t) === name), s = some[0].s;
    const own = hypervolume(some.filter((t) => !t.dense || SEVERAL), denseOf(s));
    const all = SEVERAL ? null : hypervolume(TRIALS, denseOf(s));
    return { name, some, own, share: SEVERAL ? own : all ? own / all : null };
  });
  rows.sort((a, b) => (b.share ?? -1) - (a.share ?? -1) || a.name.localeCompare(b.name));
  for (const r of rows) {
    const look = lookOf(r.some[0]), label = document.createElement("label");
    const box1 = document.createElement("input");
    box1.type = "checkbox"; box1.checked = !state.off.has(r.name); box1.value = r.name;
    box1.addEventListener("change", () => { box1.checked ? state.off.delete(r.name) : state.off.add(r.name); refresh(); });
    const mark = document.createElement("span");
    mark.className = "mark"; mark.style.color = look.colour; mark.setAttribute("aria-hidden", "true");
    mark.textContent = SEVERAL ? "▬" : r.some[0].dense ? "★" : (look.control ? HOLLOW : GLYPHS)[look.shape];
    if (!SEVERAL && r.some[0].dense) mark.style.color = D.dense;
    const text = document.createElement("span");
    text.textContent = `${r.name} (${r.some.length})`;
    const share = document.createElement("span");
    share.className = "share"; share.dataset.group = r.name;
    share.textContent = r.share === null ? "" : SEVERAL ? digits(r.share) : `${(100 * r.share).toFixed(1)} %`;
    label.append(box1, mark, text, share);
    $("groups").append(label);
  }
}
function cell(row, text, left = false) {
  const td = document.createElement("td");
  if (left) td.className = "left";
  td.textContent = text;
  row.append(td);
  return td;
}
function table() {
  const body = $("front").tBodies[0], heads = ["trial", ...(SEVERAL ? ["study"] : []), axis(state.x), axis(state.y), "95 %", "recipe"];
  $("front").tHead.innerHTML = "";
  const head = $("front").tHead.insertRow();
  for (const h of heads) { const th = document.createElement("th"); th.textContent = h; if (h === "recipe" || h === "study") th.className = "left"; head.append(th); }
  body.innerHTML = "";
  let count = 0;
  D.studies.forEach((study, s) => {
    for (const t of front(TRIALS.filter((t) => t.s === s)).filter(shown)) {
      const row = body.insertRow(), first = cell(row, "");
      const button = document.createElement("button");
      button.type = "button"; button.textContent = `${t.number}${t.knee ? " *" : ""}`; button.title = "Pin this trial";
      button.addEventListener("click", () => pin(t));
      first.append(button);
      if (SEVERAL) cell(row, study.name, true);
      cell(row, digits(value(t, state.x))); cell(row, fixed(value(t, state.y)));
      const bar = interval(t, state.y);
      cell(row, bar ? `${fixed(bar[0], 1)}–${fixed(bar[1], 1)}` : "");
      cell(row, t.recipe, true);
      count += 1;
    }
  });
  $("table-head").textContent = count ? `Front: ${count} trial${count === 1 ? "" : "s"}` : "Front: no trial within this budget";
}
function pin(t) {
  if (state.pins.includes(t)) state.pins = state.pins.filter((p) => p !== t);
  else state.pins = [...state.pins, t].slice(-2);
  $("status").textContent = state.pins.length ? `Pinned: ${state.pins.map((p, i) => `${"AB"[i]} is trial ${p.number}`).join(", ")}.` : "No trial is pinned.";
  pins(); draw();
}
function pins() {
  const box = $("pins");
  box.innerHTML = "";
  state.pins.forEach((t, i) => {
    const other = state.pins[1 - i];
    const panel = document.createElement("article");
    panel.className = "pin";
    const title = document.createElement("h3");
    title.innerHTML = `<span class="letter">${"AB"[i]}</span>trial ${t.number}: ${escaped(t.method)}${SEVERAL ? ` (${escaped(t.study.name)})` : ""}`;
    panel.append(title);
    const values = document.createElement("table");
    const head = values.createTHead().insertRow();
    for (const h of ["", "value", "95 %", other ? `vs ${"AB"[1 - i]}` : ""]) { const th = document.createElement("th"); th.textContent = h; if (!h) th.className = "left"; head.append(th); }
    const body = values.createTBody();
    for (const name of [...D.axes.y, ...D.axes.x]) {
      const v = value(t, name);
      if (v === null) continue;
      const row = body.insertRow(), bar = interval(t, name), accuracy = D.axes.y.includes(name);
      cell(row, axis(name), true);
      cell(row, accuracy ? fixed(v) : digits(v));
      cell(row, bar ? `${fixed(bar[0], 1)}–${fixed(bar[1], 1)}` : "");
      const w = other ? value(other, name) : null;
      const sign = w !== null && v > w ? "+" : "";
      cell(row, w === null ? "" : accuracy ? `${sign}${fixed(v - w)}` : `× ${digits(v / w, 3)}`);
    }
    for (const [label, text] of t.details) { const row = body.insertRow(); cell(row, label, true); const wide = cell(row, text, true); wide.colSpan = 3; }
    panel.append(values);
    const yaml = document.createElement("pre");
    yaml.textContent = t.yaml;
    panel.append(yaml);
    const buttons = document.createElement("div");
    buttons.className = "buttons";
    for (const [label, text] of [["Copy recipe", t.yaml], ["Copy export command", t.study.export.replace("{n}", t.number)]]) {
      const b = document.createElement("button");
      b.type = "button"; b.textContent = label; b.dataset.copies = text;
      b.addEventListener("click", () => copy(text, b, label));
      buttons.append(b);
    }
    const away = document.createElement("button");
    away.type = "button"; away.textContent = "Unpin"; away.addEventListener("click", () => pin(t));
    buttons.append(away);
    panel.append(buttons);
    const picture = t.study.pictures[t.number];
    if (picture) {
      const img = document.createElement("img");
      img.src = picture; img.alt = `Patches that trial ${t.number} keeps, per image and stage`;
      panel.append(img);
    }
    box.append(panel);
  });
}
// a sandboxed frame may not write to the clipboard: the text is then shown for copying
async function copy(text, button, label) {
  let done = false;
  try { await navigator.clipboard.writeText(text); done = true; } catch (_) { /* fall through to execCommand */ }
  if (!done) {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    try { done = document.execCommand("copy"); } catch (_) { done = false; }
    area.remove();
  }
  if (!done) window.prompt("Copy this text:", text);
  button.textContent = done ? "Copied" : label;
  $("status").textContent = done ? `Copied: ${text.split("\n")[0]}` : `To copy: ${text}`;
  setTimeout(() => { button.textContent = label; }, 1500);
}

// -- user input -------------------------------------------------------------------

function refresh() { groups(); table(); pins(); draw(); }
function options(select, names, chosen) {
  for (const name of names) {
    const o = document.createElement("option");
    o.value = name; o.textContent = D.names[name]; o.selected = name === chosen;
    select.append(o);
  }
}
options($("x"), D.axes.x, state.x);
options($("y"), D.axes.y, state.y);
const unit = () => { $("unit").textContent = D.units[state.x]; };
$("x").addEventListener("change", (e) => { state.x = e.target.value; state.budget = null; $("budget").value = ""; unit(); refresh(); });
$("y").addEventListener("change", (e) => { state.y = e.target.value; refresh(); });
$("bars").addEventListener("change", (e) => { state.bars = e.target.value; draw(); });
$("early").addEventListener("change", (e) => { state.early = e.target.checked; refresh(); });
$("published").addEventListener("change", (e) => { state.published = e.target.checked; draw(); });
$("budget").addEventListener("input", (e) => { const v = parseFloat(e.target.value); state.budget = v > 0 ? v : null; refresh(); });
$("controls").addEventListener("submit", (e) => e.preventDefault());
$("reset").addEventListener("click", () => {
  state.off.clear(); state.budget = null; $("budget").value = ""; state.early = true; $("early").checked = true;
  refresh(); Plotly.relayout("plot", { "xaxis.autorange": true, "yaxis.range": span() });
});
$("papers").hidden = !D.studies.some((s) => s.published.length);
if (!TRIALS.some((t) => t.state === "raced_out")) $("early").parentElement.hidden = true;
unit();
groups(); table(); draw();
$("plot").on("plotly_click", (e) => { const p = e.points.find((q) => q.customdata !== undefined); if (p) pin(TRIALS[p.customdata]); });
$("plot").addEventListener("keydown", (e) => {
  const order = TRIALS.filter(shown).sort((a, b) => value(a, state.x) - value(b, state.x) || value(a, state.y) - value(b, state.y));
  if (!order.length) return;
  const i = order.indexOf(state.at);
  if (e.key === "ArrowRight" || e.key === "ArrowUp") state.at = order[Math.min(order.length - 1, i + 1)];
  else if (e.key === "ArrowLeft" || e.key === "ArrowDown") state.at = order[Math.max(0, i - 1)];
  else if (e.key === "Home") state.at = order[0];
  else if (e.key === "End") state.at = order[order.length - 1];
  else if (e.key === "Enter" && state.at) { pin(state.at); e.preventDefault(); return; }
  else if (e.key === "Escape") { state.pins = []; state.at = null; pins(); draw(); $("status").textContent = "No trial is pinned."; return; }
  else return;
  e.preventDefault();
  const t = state.at;
  $("status").textContent = `Trial ${t.number}, ${t.recipe}: ${fixed(value(t, state.y))} % at ${digits(value(t, state.x))} ${D.units[state.x]}.`;
  draw();
});
