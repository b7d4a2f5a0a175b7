// Shows the answers kept of one step of one arm. Everything is put in as text, never as markup.
{
  const kept = JSON.parse(document.getElementById("rollouts").textContent);
  const [arm, step, out] = ["rollout-arm", "rollout-step", "rollout-out"].map((id) => document.getElementById(id));
  const label = document.getElementById("rollout-label");
  const put = (parent, tag, text, name) => {
    const made = parent.appendChild(document.createElement(tag));
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const show = () => {
    const steps = kept[arm.value].steps;
    const [number, answers] = steps[Math.min(step.value, steps.length - 1)];
    label.textContent = `step ${number}`;
    out.replaceChildren();
    let before = null;
    for (const answer of answers) {
      if (answer.problem_id !== before) {
        put(out, "p", answer.question, "asked");
        put(out, "p", `gold: ${answer.gold}`, "soft");
        before = answer.problem_id;
      }
      const card = put(out, "div", undefined, "card");
      const head = put(card, "p", undefined, "soft");
      put(head, "span", answer.strict ? "right" : "wrong", answer.strict ? "word better" : "word worse");
      const cut = answer.truncated ? ", cut off at the limit" : "";
      put(head, "span", ` reward ${answer.reward}, ${answer.tokens} tokens${cut}`);
      put(card, "pre", answer.completion);
    }
  };
  const choose = () => {
    step.max = kept[arm.value].steps.length - 1;
    step.value = Math.min(step.value, step.max);
    show();
  };
  arm.addEventListener("change", choose);
  step.addEventListener("input", show);
  choose();
}
