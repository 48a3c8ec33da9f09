"use strict";

// The language: that of the address (#lang=ja), else the one chosen before, else the page's own, else the browser's.
const root = document.documentElement;

function remembered() {
  try { return localStorage.getItem("saigen-lang"); } catch { return null; }
}

function setLanguage(lang, keep) {
  root.dataset.lang = lang;
  root.lang = lang;
  if (keep) { try { localStorage.setItem("saigen-lang", lang); } catch { /* a page opened from a file may not keep it */ } }
  for (const button of document.querySelectorAll("[data-set-lang]")) {
    button.setAttribute("aria-pressed", String(button.dataset.setLang === lang));
  }
  for (const option of document.querySelectorAll("option[data-en]")) {
    option.textContent = option.dataset[lang];
  }
  // Without storage the choice travels with the links of the page.
  for (const link of document.querySelectorAll('a[href$=".html"], a[href*=".html#lang="]')) {
    link.href = link.getAttribute("href").replace(/#lang=.*$/, "") + "#lang=" + lang;
  }
}

const asked = new URLSearchParams(location.hash.slice(1)).get("lang");
const preferred = asked || remembered() || root.dataset.opensIn || (navigator.language || "en").slice(0, 2);
setLanguage(preferred === "ja" ? "ja" : "en", false);
for (const button of document.querySelectorAll("[data-set-lang]")) {
  button.addEventListener("click", () => setLanguage(button.dataset.setLang, true));
}

// Search and filters of the index.
const search = document.getElementById("search");
if (search) {
  const domain = document.getElementById("domain");
  const verdict = document.getElementById("verdict");
  const papers = [...document.querySelectorAll(".paper")];
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const paper of papers) {
      const fits = words.every((word) => paper.dataset.text.includes(word))
        && (!domain.value || paper.dataset.domain === domain.value)
        && (!verdict.value || paper.dataset.verdict === verdict.value);
      paper.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    document.getElementById("count").value = `${shown} / ${papers.length}`;
    document.getElementById("none").hidden = shown > 0;
  };
  for (const control of [search, domain, verdict]) { control.addEventListener("input", filter); }
  filter();
}

// Copy buttons.
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1200);
  });
}
