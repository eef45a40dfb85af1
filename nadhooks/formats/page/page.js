"use strict";
// One self-contained page: `data` is what formats/html.py wrote; d3 pans and zooms; everything else is here.
const data = JSON.parse(document.getElementById("data").textContent);
const unitLevel = data.level === "unit";
const $ = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const C = data.colours;
const graph = data.graph; // node-link JSON: what is saved
graph.graph.unit_names = { ...(graph.graph.unit_names || {}) };
graph.graph.groups = { ...(graph.graph.groups || {}) };
const names = graph.graph.unit_names, groups = graph.graph.groups;
const nodes = new Map(graph.nodes.map((node) => [node.id, node]));
const incoming = new Map(), outgoing = new Map();
for (const edge of graph.edges) {
  if (!incoming.has(edge.target)) incoming.set(edge.target, []);
  if (!outgoing.has(edge.source)) outgoing.set(edge.source, []);
  incoming.get(edge.target).push(edge);
  outgoing.get(edge.source).push(edge);
}
const percent = (share) => `${Math.round(100 * share)}%`;
const count = (number) => number.toLocaleString("en-US");
const signed = (number) => (number >= 0 ? "+" : "−") + Math.abs(number).toPrecision(3);

function svgElement(kind, attributes = {}, parent = null, text = null) {
  const element = document.createElementNS(NS, kind);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}
function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// --- what the classes keep -------------------------------------------------------------------------------------------

const tasks = graph.graph.tasks || [];
const bits = new Map();
for (const [site, text] of Object.entries(data.bits || {})) {
  bits.set(site, Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
}
const switchable = bits.size > 0;
const combined = (graph.graph.combine || "union") !== "union"; // an intersection or difference, made before
function keeps(site, task, unit) {
  const row = Math.ceil(nodes.get(site).units / 8);
  return (bits.get(site)[task * row + (unit >> 3)] >> (7 - (unit & 7))) & 1;
}
const counted = new Map(); // by how many classes each unit is kept
function sharing(site) {
  if (!counted.has(site)) {
    const node = nodes.get(site), counts = new Uint32Array(node.units);
    for (let task = 0; task < tasks.length; task++)
      for (let unit = 0; unit < node.units; unit++) counts[unit] += switchable ? keeps(site, task, unit) : 0;
    if (!switchable) node.use.forEach((share, unit) => { counts[unit] = Math.round(share * tasks.length); });
    counted.set(site, counts);
  }
  return counted.get(site);
}
const MODES = {
  all: ["all classes", () => 0],
  one: ["alone", (a) => a],
  over: ["over", (a, b) => a + 2 * b],
  union: ["or (union)", (a, b) => a | b],
  intersection: ["and (intersection)", (a, b) => a & b],
  difference: ["without", (a, b) => (a && !b ? 1 : 0)],
};
const opening = { 1: "one", 2: "over" }; // by the number of classes: two have a colour each, as in the pictures
const state = { mode: (switchable && opening[tasks.length]) || "all", first: 0, second: Math.min(1, tasks.length - 1), threshold: 0, chosen: [] };

// of each unit of a site, its place in the palette, and how many are kept
function categories(site) {
  const node = nodes.get(site), out = new Uint8Array(node.units);
  let kept = 0;
  if (state.mode === "all") {
    const counts = sharing(site), shades = C.shades.length, levels = Math.min(tasks.length, shades);
    const shade = (count) => count && 1 + Math.round(((Math.ceil((levels * count) / tasks.length) - 1) * (shades - 1)) / (levels - 1));
    for (let unit = 0; unit < node.units; unit++) {
      out[unit] = tasks.length <= 1 || combined ? (counts[unit] ? shades : 0) : shade(counts[unit]);
      kept += counts[unit] > 0;
    }
  } else {
    const combine = MODES[state.mode][1];
    for (let unit = 0; unit < node.units; unit++) {
      out[unit] = combine(keeps(site, state.first, unit), keeps(site, state.second, unit));
      kept += out[unit] > 0;
    }
  }
  return { out, kept };
}
function fills() {
  if (state.mode === "all") return [C.faint, ...C.shades];
  return state.mode === "over" ? [C.faint, ...C.tasks, C.both] : [C.faint, C.tasks[0]];
}

// --- drawing ---------------------------------------------------------------------------------------------------------

const svg = $("picture");
const view = svgElement("g", { id: "view" }, svg);
svgElement("style", {}, view, `text{font-family:"DejaVu Sans",Arial,sans-serif;fill:${C.ink};pointer-events:none}.grey{fill:${C.grey}}.edge{fill:none}#words text{paint-order:stroke;stroke:#fff;stroke-width:1.6px;stroke-opacity:.85}.hit{fill:transparent}`);
const layers = Object.fromEntries(["edges", "sites", "marks", "light", "words"].map((name) => [name, svgElement("g", { id: name }, view)]));
const path = (points) => points.reduce((text, [x, y], i) => text + (i === 0 ? `M${x} ${y}` : i % 3 === 1 ? `C${x} ${y}` : ` ${x} ${y}`), "");
const box = (x, y, w, h) => `M${x} ${y}h${w}v${h}h${-w}z`;
const drawn = new Map(); // what changes, by site or by edge

function words() {
  for (const label of data.labels) {
    const turn = label.turned ? { transform: `rotate(-90 ${label.x} ${label.y})` } : {};
    svgElement("text", { x: label.x, y: label.y, "font-size": label.size, "text-anchor": label.align, class: label.grey ? "grey" : "", ...turn }, layers.words, label.text);
  }
  for (const [x1, x2, y] of data.rules) svgElement("path", { d: `M${x1} ${y}H${x2}`, stroke: C.grey, "stroke-width": 0.6 }, layers.words);
}

function drawSites() {
  for (const [source, target, points] of data.routes) {
    const edge = outgoing.get(source).find((other) => other.target === target);
    const join = edge.join || "sequential";
    const line = svgElement("path", { class: "edge", d: path(points), stroke: C.joins[join] || C.joins.sequential, "stroke-opacity": 0.42, "data-edge": `${source} → ${target}` }, layers.edges);
    drawn.set(edge, line);
  }
  for (const node of graph.nodes) {
    const [x, y, w, h] = data.places[node.id];
    const group = svgElement("g", { "data-site": node.id, class: node.kind }, layers.sites);
    if (node.kind === "site") {
      const paths = Array.from({ length: 7 }, () => svgElement("path", {}, group));
      const figure = svgElement("text", { ...data.figures[node.id], class: "grey" }, layers.words);
      drawn.set(node.id, { paths, figure });
    } else if (node.kind !== "join") svgElement("path", { d: box(x, y, w, h), fill: C.ink }, group);
    svgElement("path", { class: "hit", d: box(x - 3, y - 3, w + 6, h + 6), "data-site": node.id }, group);
  }
}

function drawSigns() { // how flows join
  for (const sign of data.signs) {
    if (sign.line) {
      const [x, y, X, Y] = sign.line;
      svgElement("path", { d: `M${x} ${y}L${X} ${Y}`, stroke: sign.colour, "stroke-width": sign.width, style: "pointer-events:none" }, layers.marks);
    } else svgElement("circle", { cx: sign.x, cy: sign.y, r: sign.r, fill: "#fff", stroke: sign.colour, "stroke-width": 0.5, style: "pointer-events:none" }, layers.marks);
  }
}

function paintSites() {
  const colours = fills(), shares = new Map();
  let kept = 0, units = 0;
  for (const node of graph.nodes) {
    if (node.kind !== "site") { shares.set(node.id, 1); continue; }
    const [x, y, , , columns, cell] = data.places[node.id], gap = cell < 2 ? 0 : 0.14 * cell;
    const found = categories(node.id), parts = colours.map(() => []);
    for (let unit = 0; unit < node.units; unit++) {
      const row = Math.floor(unit / columns), side = +(cell - gap).toFixed(2);
      parts[found.out[unit]].push(box(+(x + (unit - row * columns) * cell + gap / 2).toFixed(2), +(y + row * cell + gap / 2).toFixed(2), side, side));
    }
    const { paths, figure } = drawn.get(node.id);
    paths.forEach((each, i) => { each.setAttribute("d", i < parts.length ? parts[i].join("") : ""); each.setAttribute("fill", colours[i] || "none"); });
    figure.textContent = data.counts ? `${count(found.kept)} / ${count(node.units)}` : percent(found.kept / node.units);
    shares.set(node.id, found.kept / node.units);
    kept += found.kept;
    units += node.units;
  }
  let shown = 0;
  for (const edge of graph.edges) {
    const share = "flow" in graph.graph ? edge.share : shares.get(edge.source), line = drawn.get(edge);
    const visible = share >= state.threshold;
    shown += visible;
    line.setAttribute("stroke-width", Math.max(0.4, share * data.band).toFixed(2));
    line.style.display = visible ? "" : "none";
  }
  if (combined) $("headline").textContent = data.headline;
  else $("headline").textContent = `${sentence()}: ${count(kept)} of ${count(units)} units ${graph.graph.counted || "kept"} (${percent(kept / Math.max(1, units))}), ${count(shown)} of ${count(graph.edges.length)} edges`;
}
function sentence() {
  const [a, b] = [tasks[state.first], tasks[state.second]].map((name) => (/^\d+$/.test(name) ? `class ${name}` : name));
  if (state.mode === "all") return tasks.length === 1 ? `class ${tasks[0]}` : `${count(tasks.length)} classes, kept by at least one`;
  return { one: a, over: `${a} over ${b}`, union: `${a} or ${b}`, intersection: `${a} and ${b}`, difference: `${a} without ${b}` }[state.mode];
}

const STEPS = 12;
const most = unitLevel ? graph.edges.reduce((top, edge) => Math.max(top, Math.abs(edge.weight)), 0) || 1 : 1;
function ends(edge) {
  const [x, y, w, h] = data.places[edge.source], [X, Y, , H] = data.places[edge.target];
  const node = nodes.get(edge.source), right = "row" in node ? x + w * (node.columns - node.column) : x + w;
  return [right, y + h / 2, X, Y + H / 2].map((value) => +value.toFixed(2));
}
function swing(edge) {
  const [x, y, X, Y] = ends(edge), middle = +((x + X) / 2).toFixed(2);
  return `M${x} ${y}C${middle} ${y} ${middle} ${Y} ${X} ${Y}`;
}
function drawUnits() {
  for (const [site, [x, y, w, h]] of Object.entries(data.strips)) svgElement("path", { d: box(x, y, w, h), fill: C.faint, "data-site": site }, layers.sites);
  for (let step = 0; step < 2 * STEPS; step++) {
    const share = (Math.floor(step / 2) + 0.5) / STEPS;
    svgElement("path", { class: "edge", stroke: step % 2 ? C.negative : C.positive, "stroke-width": Math.max(0.25, 3.4 * share).toFixed(2), "stroke-opacity": (0.18 + 0.67 * Math.sqrt(share)).toFixed(2) }, layers.edges);
  }
  for (const node of graph.nodes) {
    const [x, y, w, h] = data.places[node.id];
    svgElement("path", { d: box(x, y, w, h), fill: data.fills[node.id], "data-node": node.id, ...(node.kind === "bias" || "row" in node ? { stroke: C.grey, "stroke-width": 0.4 } : {}) }, layers.marks);
  }
}
function paintUnits() {
  const parts = Array.from({ length: 2 * STEPS }, () => []);
  let shown = 0;
  for (const edge of graph.edges) {
    const share = Math.abs(edge.weight) / most;
    if (share < state.threshold) continue;
    shown += 1;
    parts[2 * Math.min(STEPS - 1, Math.floor(share * STEPS)) + (edge.weight < 0)].push(swing(edge));
  }
  [...layers.edges.children].forEach((each, i) => each.setAttribute("d", parts[i].join("")));
  $("headline").textContent = `${data.headline}; ${count(shown)} of ${count(graph.edges.length)} edges shown`;
}
function paint() {
  $("least").textContent = percent(state.threshold);
  (unitLevel ? paintUnits : paintSites)();
  mark();
  legend();
}

// --- choosing units and sites ----------------------------------------------------------------------------------------

const keyOf = (site, unit) => `${site}:${unit}`;
function apart(key) { // "site:3" -> ["site", 3], a site or a node -> [name, null]
  if (unitLevel) { const node = nodes.get(key); return node && node.kind === "unit" ? [node.site, node.unit] : [key, null]; }
  const place = key.lastIndexOf(":"), site = key.slice(0, place), unit = Number(key.slice(place + 1));
  return place > 0 && nodes.has(site) && Number.isInteger(unit) ? [site, unit] : [key, null];
}
function outline(key) {
  const [site, unit] = apart(key);
  if (unitLevel) return data.places[key] || data.strips[key];
  const place = data.places[site];
  if (!place || unit === null) return place;
  const [x, y, , , columns, cell] = place;
  return [x + (unit % columns) * cell, y + Math.floor(unit / columns) * cell, cell, cell];
}
function mark() {
  layers.light.replaceChildren();
  for (const key of Object.keys(names)) if (names[key] && outline(key)) {
    const [x, y, w, h] = outline(key);
    svgElement("path", { d: box(x, y, w, h), fill: "none", stroke: C.ink, "stroke-width": 0.7 }, layers.light);
    svgElement("text", { x: x + w + 1.5, y: y + h / 2 + 2, "font-size": 5.5, style: "paint-order:stroke", stroke: "#fff", "stroke-width": 1.6 }, layers.light, names[key]);
  }
  for (const key of state.chosen) if (outline(key)) {
    const [x, y, w, h] = outline(key);
    if (unitLevel && nodes.has(key)) lightEdges(key);
    svgElement("path", { d: box(x - 0.8, y - 0.8, w + 1.6, h + 1.6), fill: "none", stroke: "#000", "stroke-width": 1.3 }, layers.light);
  }
}
function lightEdges(key) {
  for (const edge of [...(incoming.get(key) || []), ...(outgoing.get(key) || [])]) {
    if (Math.abs(edge.weight) / most < state.threshold) continue;
    const width = Math.max(0.7, 3.4 * Math.abs(edge.weight) / most).toFixed(2);
    svgElement("path", { class: "edge", d: swing(edge), stroke: edge.weight < 0 ? C.negative : C.positive, "stroke-width": width }, layers.light);
  }
}
function choose(key, more = false) {
  if (key === null) state.chosen = [];
  else if (more) state.chosen = state.chosen.includes(key) ? state.chosen.filter((other) => other !== key) : [...state.chosen, key];
  else state.chosen = [key];
  mark();
  card();
}
function under(event) { // what lies under the pointer: a unit's key, a site's or node's name, or null
  const target = event.target;
  if (target.dataset && target.dataset.node) return target.dataset.node;
  const site = target.closest && target.closest("[data-site]");
  if (!site) return null;
  const name = site.dataset.site, place = data.places[name];
  if (unitLevel || !place || !place[4]) return name;
  const at = d3.pointer(event, view), column = Math.floor((at[0] - place[0]) / place[5]), row = Math.floor((at[1] - place[1]) / place[5]);
  const unit = row * place[4] + column;
  return column >= 0 && column < place[4] && row >= 0 && unit < nodes.get(name).units ? keyOf(name, unit) : name;
}
function keepers(site, unit) {
  if (!switchable) return null;
  return tasks.filter((_, task) => keeps(site, task, unit));
}
function about(key) {
  const [site, unit] = apart(key), named = names[key] ? `${names[key]}\n` : "";
  if (unitLevel) {
    const node = nodes.get(key);
    if (!node) { const facts = graph.graph.sites[key]; return facts ? `${key}\n${facts.shown ?? "?"} shown of ${count(facts.kept)} kept of ${count(facts.units)} units` : key; }
    return named + key + ("attribution" in node ? `\nattribution ${signed(node.attribution)}` : "");
  }
  if (unit === null) { const node = nodes.get(site); return node && node.units ? `${site}\n${count(categories(site).kept)} of ${count(node.units)} units kept` : site; }
  const by = sharing(site)[unit];
  return `${named}${key}\nkept by ${count(by)} of ${count(tasks.length)} classes`;
}
const tip = $("tip");
svg.addEventListener("pointermove", (event) => {
  const key = under(event), line = event.target.dataset && event.target.dataset.edge;
  tip.style.display = key || line ? "block" : "none";
  if (key || line) tip.textContent = key ? about(key) : line;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 350)}px`;
  tip.style.top = `${event.clientY + 14}px`;
});
svg.addEventListener("pointerleave", () => { tip.style.display = "none"; });
svg.addEventListener("click", (event) => choose(under(event), event.shiftKey));

// --- the card --------------------------------------------------------------------------------------------------------

const link = (key) => element("button", { class: "link", onclick: () => { choose(key); show(key); } }, names[key] ? `${names[key]} (${key})` : key);
function table(rows) {
  const made = element("table");
  for (const row of rows) made.append(element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
  return made;
}
function edgesTable(edges, end) {
  const strength = (edge) => Math.abs(edge.weight ?? edge.share ?? 0);
  const rows = [...edges].sort((a, b) => strength(b) - strength(a)).slice(0, 10);
  return table(rows.map((edge) => [link(edge[end]), "weight" in edge ? signed(edge.weight) : edge.join || "sequential"]));
}
function card() {
  const place = $("card"), { chosen } = state;
  place.replaceChildren();
  if (!chosen.length) return help(place);
  const key = chosen[chosen.length - 1], [site, unit] = apart(key), node = nodes.get(unitLevel ? key : site);
  place.append(element("h2", {}, chosen.length > 1 ? `${chosen.length} units` : key));
  if (chosen.length > 1) place.append(table(chosen.slice(0, 20).map((each) => [link(each), ""])));
  else if (unit !== null) unitCard(place, key, site, unit, node);
  else if (node) siteCard(place, site, node);
  if (unit !== null) naming(place, chosen);
}
function siteCard(place, site, node) {
  const rows = [["module", node.module || site], ["stage", String(node.stage)]];
  if (node.units) rows.push(["units", count(node.units)], ["kept", `${count(categories(site).kept)} (${percent(categories(site).kept / node.units)})`]);
  if (node.join) rows.push(["join", node.join]);
  if ("attribution" in node) rows.push(["attribution", signed(node.attribution)]);
  if (node.members) rows.push(["sites", count(node.members.length)]);
  place.append(table(rows));
  if (incoming.has(site)) place.append(element("h3", {}, "fed by"), edgesTable(incoming.get(site), "source"));
  if (outgoing.has(site)) place.append(element("h3", {}, "feeds"), edgesTable(outgoing.get(site), "target"));
}
function unitCard(place, key, site, unit, node) {
  const rows = [["site", link(site)], ["unit", String(unit)]];
  if ("attribution" in node) rows.push(["attribution", signed(node.attribution)]);
  if (!unitLevel) rows.push(["kept by", `${count(sharing(site)[unit])} of ${count(tasks.length)} classes`]);
  place.append(table(rows));
  const seen = unitLevel ? node : (node.seen || {})[unit] || {};
  if (seen.sees) {
    place.append(element("h3", {}, "what it sees"));
    const images = seen.sees.map((each) => element("figure", {}, element("img", { src: each.crop, alt: `image ${each.image}, class ${each.label}` }), `${each.label} · ${each.activation.toPrecision(2)}`));
    place.append(element("div", { class: "images" }, ...images));
  }
  if (seen.activation) {
    place.append(element("h3", {}, "mean activation by class"));
    const entries = Object.entries(seen.activation).sort((a, b) => b[1] - a[1]), top = Math.max(1e-12, ...entries.map((entry) => Math.abs(entry[1])));
    place.append(table(entries.slice(0, 12).map(([name, value]) => [name, element("span", {}, element("span", { class: value < 0 ? "bar least" : "bar", style: `width:${(90 * Math.abs(value)) / top}px` }), ` ${value.toPrecision(2)}`)])));
  }
  if (unitLevel && incoming.has(key)) place.append(element("h3", {}, "fed by"), edgesTable(incoming.get(key), "source"));
  if (unitLevel && outgoing.has(key)) place.append(element("h3", {}, "feeds"), edgesTable(outgoing.get(key), "target"));
  const by = unitLevel ? null : keepers(site, unit);
  if (by && by.length) place.append(element("h3", {}, "kept by"), element("p", {}, by.slice(0, 40).join(", ") + (by.length > 40 ? ", …" : "")));
}
function naming(place, chosen) {
  const units = chosen.filter((key) => apart(key)[1] !== null);
  const name = element("input", { type: "text", id: "name", placeholder: "name of the unit", "aria-label": "name of the unit", value: units.length === 1 ? names[units[0]] || "" : "" });
  const group = element("input", { type: "text", id: "group", placeholder: "group", "aria-label": "name of the group" });
  const keepName = () => { if (name.value.trim()) names[units[0]] = name.value.trim(); else delete names[units[0]]; paint(); card(); };
  const keepGroup = () => { const word = group.value.trim(); if (word) { groups[word] = [...new Set([...(groups[word] || []), ...units])]; card(); } };
  const enter = (act) => (event) => { if (event.key === "Enter") act(); event.stopPropagation(); };
  name.addEventListener("keydown", enter(keepName));
  group.addEventListener("keydown", enter(keepGroup));
  if (units.length === 1) place.append(element("h3", {}, "name"), element("div", { class: "row" }, name, element("button", { id: "keep-name", onclick: keepName }, "keep")));
  place.append(element("h3", {}, units.length > 1 ? `group these ${units.length}` : "add to a group"), element("div", { class: "row" }, group, element("button", { id: "keep-group", onclick: keepGroup }, "add")));
  groupList(place);
}
function groupList(place) {
  if (!Object.keys(groups).length) return;
  place.append(element("h3", {}, "groups"));
  place.append(table(Object.entries(groups).map(([word, members]) => [
    element("button", { class: "link", onclick: () => { state.chosen = [...members]; mark(); card(); } }, word),
    element("span", {}, `${members.length} `, element("button", { "aria-label": `forget ${word}`, onclick: () => { delete groups[word]; card(); } }, "×")),
  ])));
}
function help(place) {
  place.append(element("h2", {}, "Keys"));
  const keys = [["← →", "site before, after"], ["↑ ↓", "unit before, after"], ["Enter", "from a site into its units"], ["Shift + click", "choose several"], ["/", "search"], ["+ − 0", "zoom, fit"], ["Esc", "choose nothing"]];
  place.append(table(keys.map(([key, what]) => [element("kbd", {}, key), what])));
  const named = Object.keys(names);
  if (named.length) place.append(element("h3", {}, "named units"), table(named.map((key) => [link(key), ""])));
  groupList(place);
}

// --- keys, search, zoom ----------------------------------------------------------------------------------------------

const zoom = d3.zoom().scaleExtent([0.05, 60]).on("zoom", (event) => view.setAttribute("transform", event.transform));
d3.select(svg).call(zoom).on("dblclick.zoom", null);
function fit() {
  const { width, height } = svg.getBoundingClientRect(), [w, h] = data.size;
  const scale = Math.min(width / w, height / h) * 0.97;
  d3.select(svg).call(zoom.transform, d3.zoomIdentity.translate((width - w * scale) / 2, (height - h * scale) / 2).scale(scale));
}
function show(key) { // brings it into view
  const place = outline(key);
  if (!place) return;
  const [x, y, w, h] = place, { width, height } = svg.getBoundingClientRect(), now = d3.zoomTransform(svg);
  const [left, top] = now.apply([x, y]);
  if (left < 20 || top < 20 || left > width - 20 || top > height - 20) d3.select(svg).call(zoom.translateTo, x + w / 2, y + h / 2);
}
const order = graph.nodes.map((node) => node.id).filter((id) => unitLevel || nodes.get(id).kind !== "join");
const sitesInOrder = unitLevel ? Object.keys(graph.graph.sites).filter((site) => site in data.strips) : order;
const unitsOf = (site) => (unitLevel ? order.filter((id) => nodes.get(id).site === site && nodes.get(id).kind === "unit").sort((a, b) => nodes.get(a).unit - nodes.get(b).unit) : null);
function step(direction, inside) {
  const key = state.chosen[state.chosen.length - 1] ?? null;
  if (key === null) return sitesInOrder[0];
  const [site, unit] = apart(key);
  if (!inside) {
    const at = sitesInOrder.indexOf(site);
    return sitesInOrder[Math.min(sitesInOrder.length - 1, Math.max(0, at + direction))];
  }
  if (unitLevel) {
    const units = unitsOf(site);
    return units.length ? units[Math.min(units.length - 1, Math.max(0, units.indexOf(key) + direction))] : key;
  }
  const node = nodes.get(site);
  return node.units ? keyOf(site, Math.min(node.units - 1, Math.max(0, (unit ?? -1) + direction))) : key;
}
svg.addEventListener("keydown", (event) => {
  const moves = { ArrowRight: [1, false], ArrowLeft: [-1, false], ArrowDown: [1, true], ArrowUp: [-1, true], Enter: [1, true] };
  if (event.key in moves && !event.ctrlKey && !event.metaKey) {
    const next = step(...moves[event.key]);
    choose(next, false);
    show(next);
    event.preventDefault();
  }
});
document.addEventListener("keydown", (event) => {
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.key !== "Escape") return;
  if (event.key === "/") { $("search").focus(); event.preventDefault(); }
  else if (event.key === "Escape") { choose(null); svg.focus(); }
  else if (event.key === "0") fit();
  else if (event.key === "+" || event.key === "=") d3.select(svg).call(zoom.scaleBy, 1.4);
  else if (event.key === "-") d3.select(svg).call(zoom.scaleBy, 1 / 1.4);
});
function search(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const named = Object.keys(names).filter((key) => names[key].toLowerCase().includes(wanted));
  const grouped = Object.keys(groups).filter((word) => word.toLowerCase() === wanted).flatMap((word) => groups[word]);
  const sites = [...new Set([...sitesInOrder, ...order])].filter((id) => id.toLowerCase().includes(wanted) || String((nodes.get(id) || {}).module || "").toLowerCase().includes(wanted));
  const [site, unit] = apart(text.trim());
  const exact = !unitLevel && unit !== null && unit >= 0 && unit < nodes.get(site).units ? [text.trim()] : [];
  return [...new Set([...exact, ...named, ...grouped, ...sites.sort((a, b) => (b.toLowerCase() === wanted) - (a.toLowerCase() === wanted))])];
}
$("search").addEventListener("input", (event) => {
  const found = search(event.target.value);
  $("found").replaceChildren(...found.slice(0, 12).map((key) => element("option", { value: key })));
  if (found.length) { choose(found[0]); show(found[0]); }
});
$("threshold").addEventListener("input", (event) => { state.threshold = (Number(event.target.value) / 100) ** (unitLevel ? 2 : 1); paint(); });
$("fit").addEventListener("click", fit);
addEventListener("resize", fit);

// --- classes ---------------------------------------------------------------------------------------------------------

function classes() {
  if (!switchable || unitLevel) { document.querySelectorAll(".classes").forEach((each) => { each.style.display = "none"; }); return; }
  for (const id of ["first", "second"]) {
    $(id).append(...tasks.map((name, task) => element("option", { value: task }, name)));
    $(id).value = state[id];
    $(id).addEventListener("change", (event) => { state[id] = Number(event.target.value); if (state.mode === "all") { state.mode = $("mode").value = "one"; } update(); });
  }
  const modes = Object.entries(MODES).filter(([mode]) => tasks.length > 1 || mode === "one");
  $("mode").append(...modes.map(([mode, [text]]) => element("option", { value: mode }, text)));
  $("mode").value = state.mode;
  $("mode").addEventListener("change", (event) => { state.mode = event.target.value; update(); });
  update();
}
function update() {
  $("with").style.display = ["all", "one"].includes(state.mode) ? "none" : "";
  paint();
  if (state.chosen.length) card();
}
function legend() {
  const key = (colour, text) => element("span", {}, element("span", { class: "key", style: `background:${colour}` }), text);
  const place = $("legend"), items = [];
  if (unitLevel) {
    items.push(key(C.positive, "raises the logit"), key(C.negative, "lowers it"));
    const facts = graph.graph, known = ["weighting", "reference", "estimator"].filter((word) => word in facts).map((word) => `${word}: ${facts[word]}`);
    items.push(`strongest effect ${most.toPrecision(3)}`, ...known, "above strips: shown / kept / all units, share of |attribution| shown");
  } else {
    const [a, b] = [tasks[state.first], tasks[state.second]];
    if (state.mode === "over") items.push(key(C.tasks[0], `${a} only`), key(C.tasks[1], `${b} only`), key(C.both, "both"));
    else if (state.mode === "all" && tasks.length > 1 && !combined) items.push(key(C.shades[0], "kept by one"), key(C.shades[C.shades.length - 1], "kept by all"));
    else items.push(key(C.tasks[0], graph.graph.counted || "kept"));
    items.push(key(C.faint, graph.graph.counted ? "others" : "dropped"));
    const joins = [...new Set(graph.edges.map((edge) => edge.join || "sequential"))];
    for (const join of joins.length > 1 ? joins : []) items.push(key(C.joins[join] || C.joins.sequential, join === "sum" ? "residual sum" : join));
    items.push(graph.graph.flow || "bands: share of the source's units kept");
  }
  place.replaceChildren(...items.map((item) => (typeof item === "string" ? element("span", {}, item) : item)));
}

// --- files -----------------------------------------------------------------------------------------------------------

function download(name, kind, text) {
  const address = URL.createObjectURL(new Blob([text], { type: kind }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
function graphText() { return JSON.stringify(graph); }
function svgText() { // what is seen now
  const copy = svg.cloneNode(true), { width, height } = svg.getBoundingClientRect();
  for (const name of ["tabindex", "role", "id"]) copy.removeAttribute(name);
  copy.setAttribute("viewBox", `0 0 ${width} ${height}`);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.querySelectorAll(".hit").forEach((each) => each.remove());
  return '<?xml version="1.0" encoding="UTF-8"?>\n' + new XMLSerializer().serializeToString(copy);
}
function takeNames(text) {
  const facts = JSON.parse(text).graph || {};
  Object.assign(names, facts.unit_names || {});
  Object.assign(groups, facts.groups || {});
  paint();
  card();
}
$("save").addEventListener("click", () => download("flow.svg", "image/svg+xml", svgText()));
$("export").addEventListener("click", () => download("flow.json", "application/json", graphText()));
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async (event) => {
  try { takeNames(await event.target.files[0].text()); }
  catch (error) { alert(`expected a flow graph's JSON, with names in it: ${error.message}`); }
  event.target.value = "";
});

$("model").textContent = data.model || "information flow";
words();
if (unitLevel) drawUnits();
else {
  drawSites();
  drawSigns();
}
classes();
paint();
card();
fit();
