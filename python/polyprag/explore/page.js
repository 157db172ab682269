"use strict";

// Whatever comes from a store is text: it is set with textContent and never read as HTML.
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

function node(name, options = {}, ...children) {
  const made = document.createElement(name);
  if (options.class) made.className = options.class;
  if (options.text !== undefined) made.textContent = options.text;
  made.append(...children);
  return made;
}

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// One heat map: a column a layer, a row an expert.
function heatMap(facet, most) {
  const layers = facet.layers.length, experts = facet.weights[0].length;
  const cell = Math.max(8, Math.min(24, Math.floor(760 / layers)));
  const high = Math.max(8, Math.min(16, Math.floor(240 / experts)));
  const width = 48 + layers * cell, height = experts * high + 18;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "heat",
    "aria-label": `${facet.name}: weights of ${experts} experts in ${layers} layers` });
  facet.weights.forEach((weights, x) => weights.forEach((weight, y) => {
    const box = svg("rect", { x: 40 + x * cell, y: y * high, width: cell - 1, height: high - 1,
      "fill-opacity": (0.04 + 0.96 * Math.min(Math.abs(weight) / most, 1)).toFixed(3) });
    if (weight < 0) box.setAttribute("class", "negative");
    box.append(svg("title", {}, `${facet.name} ${facet.layers[x]}, expert ${y}: ${weight.toFixed(3)}`));
    picture.append(box);
  }));
  const every = Math.max(1, Math.round(14 / cell));
  for (let x = 0; x < layers; x += every)
    picture.append(svg("text", { x: 40 + (x + 0.5) * cell, y: height - 4, "text-anchor": "middle" }, facet.layers[x]));
  for (let y = 0; y < experts; y += Math.ceil(12 / high))
    picture.append(svg("text", { x: 34, y: (y + 1) * high - 2, "text-anchor": "end" }, String(y)));
  return picture;
}

function showRoute(title, route) {
  at("route-title").textContent = title;
  const most = Math.max(1e-9, ...route.flatMap((facet) => facet.weights.flat().map(Math.abs)));
  at("route").replaceChildren(...route.flatMap((facet) => [node("h3", { text: facet.name }), heatMap(facet, most)]));
  if (!route.length) at("route").replaceChildren(node("p", { class: "soft", text: "It has no route." }));
}

function documentRow(found, most, show) {
  const meter = node("span");
  meter.style.width = `${(100 * Math.abs(found.weight)) / most}%`;
  const text = found.text === null ? "(the store keeps no texts)" : found.text;
  const row = node("button", {},
    node("span", { class: "title", text: found.title || found.id }),
    node("span", { class: "meter" }, meter),
    node("span", { class: "text", text: text.length > 320 ? `${text.slice(0, 320)} ...` : text }),
    node("span", { class: "numbers", text: `weight ${found.weight.toFixed(3)}, BM25 ${found.score.toFixed(2)}` }));
  row.type = "button";
  row.setAttribute("aria-pressed", "false");
  row.addEventListener("click", () => show(row, found));
  return node("li", {}, row);
}

function showFound(found) {
  const without = found.without_route === null ? "(no base model here)" : found.without_route || "(nothing)";
  at("without-route").textContent = without;
  at("with-route").textContent = found.with_route === null
    ? (found.documents.length || found.without_route === null ? without : "no document matches: the base model's own answer")
    : found.with_route || "(nothing)";
  const most = Math.max(1e-9, ...found.documents.map((document) => Math.abs(document.weight)));
  const combined = () => showRoute("The combined route", found.route);
  const show = (row, document) => {
    const again = row.getAttribute("aria-pressed") === "true";
    for (const other of at("documents").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
    if (again) return combined();
    row.setAttribute("aria-pressed", "true");
    showRoute(`The route of ${document.title || document.id}`, document.route);
  };
  at("documents").replaceChildren(...found.documents.map((document) => documentRow(document, most, show)));
  combined();
  at("found").hidden = false;
}

async function ask(event) {
  event.preventDefault();
  at("go").disabled = true;
  at("status").textContent = "Asking ...";
  try {
    const reply = await fetch("/ask", { method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ question: at("question").value, k: Number(at("k").value) }) });
    const found = await reply.json();
    if (!reply.ok) throw new Error(found.error);
    showFound(found);
    at("status").textContent = `${found.seconds.toFixed(found.seconds < 1 ? 3 : 1)} s`;
  } catch (error) {
    at("found").hidden = true;
    at("status").textContent = error.message;
  } finally {
    at("go").disabled = false;
  }
}

async function begin() {
  const about = await (await fetch("/about")).json();
  at("store").textContent = about.name;
  at("about").textContent = `${about.documents} documents, ${about.experts} experts, ${about.base_model}`
    + (about.answers ? "" : ` (${about.why_no_answers})`);
  at("k").value = about.k;
  at("ask").addEventListener("submit", ask);
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.get("k")) at("k").value = asked.get("k");
  const question = asked.get("q");
  if (question) { at("question").value = question; at("ask").requestSubmit(); }
}

begin();
