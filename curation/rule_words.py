"""Phrase lists of the cleaning rules: short, in lowercase, compiled for this project and easy to change.

Good text contains such phrases too: a law against gambling contains "博彩". No rule drops a document for one phrase;
`matched_phrases` in drop_rules.py has the threshold. `--unsafe_words FILE` adds phrases to UNSAFE_PHRASES.

Read next: drop_rules.py (`adverts`, `unsafe`), edit_rules.py (`boilerplate`).
"""

# Patterns of short lines that are notices. They match anywhere in a document.
NOTICE_PATTERNS = (
    r"版权所有(?![者人权])", r"未经授权.{0,8}(?:不得|禁止|严禁|请勿).{0,3}(?:转载|复制|摘编|镜像)", r"转载请注明",
    r"责任编辑[:：\s]", r"责编[:：]", r"(?:本文|文章)来源[:：]", r"备案号[:：]", r"ICP备\s?\d", r"公网安备\s?\d",
    r"违法和不良信息举报", r"^\W*(?:当前位置|您的位置|浏览次数)[:：]",
    r"^\W*(?:©|\(c\)\s?\d{4}|copyright\s{0,2}(?:©|\(c\)|\d{4}))", r"all rights reserved\W*$",
    r"^\W*(?:please )?(?:enable|turn on|activate) javascript", r"javascript is (?:disabled|not enabled)",
    r"(?:site|page|application) requires javascript", r"^\W*(?:this|our) (?:web)?site uses cookies",
    r"^\W*we use cookies (?:to|on)\b", r"(?:subscribe to|sign up for) our (?:\w+ )?newsletter",
    r"^\W*skip to (?:main )?content\W*$",
)  # fmt: skip
# Navigation links: a line that begins or ends with one and contains no sentence mark.
MENU_ZH = (
    "上一篇", "下一篇", "上一页", "下一页", "相关阅读", "相关推荐", "推荐阅读", "延伸阅读", "热门推荐", "猜你喜欢",
    "点击查看", "点击阅读", "阅读全文", "查看更多", "展开全文", "返回首页", "返回顶部", "打印本页", "关闭窗口",
    "加入收藏", "设为首页", "网站地图", "联系我们", "关于我们", "免责声明", "分享到", "扫码关注", "扫一扫",
    "关注公众号", "微信公众号", "登录后查看", "登录后评论", "登录后发表", "登录后可", "注册登录", "发表评论",
    "网友评论",
)  # fmt: skip
MENU_EN = (
    "privacy policy", "terms of service", "terms of use", "cookie policy", "click here", "read more", "log in to",
    "sign in to", "sign up for", "share this", "follow us on", "back to top", "leave a reply", "leave a comment",
    "powered by",
)  # fmt: skip
# Prefilter of `boilerplate`: a text without any of these (in lowercase) has no such line.
BOILERPLATE_HINTS = (
    *MENU_ZH, *MENU_EN, "版权所有", "未经授权", "转载请注明", "责任编辑", "责编", "来源", "备案号", "icp备", "公网安备",
    "不良信息举报", "当前位置", "您的位置", "浏览次数", "©", "(c)", "copyright", "all rights reserved", "javascript",
    "cookies", "newsletter", "skip to",
)  # fmt: skip

ADVERT_PHRASES = (
    "加微信", "加我微信", "加薇信", "微信号：", "加qq", "qq群号", "咨询热线", "免费咨询", "点击领取", "限时优惠",
    "限时抢购", "优惠券", "秒杀价", "包邮", "代理加盟", "招商加盟", "诚招代理", "日赚", "月入过万", "轻松赚钱",
    "躺赚", "刷单", "兼职日结", "贷款秒批", "无抵押贷款", "信用卡套现", "代开发票", "代办证件", "办理文凭",
    "论文代写", "代写论文", "代孕", "增粉", "私服", "外挂下载", "破解版下载", "免费下载地址", "货到付款", "厂家直销",
    "量大从优", "欢迎来电", "欢迎选购", "buy now", "order now", "limited time offer", "free shipping", "act now",
    "click the link below", "promo code", "discount code", "make money fast", "work from home and earn",
    "casino bonus", "payday loan", "100% free", "add to cart", "lowest price", "special offer",
)  # fmt: skip

UNSAFE_PHRASES = (
    "成人电影", "成人视频", "成人小说", "色情", "情色", "黄色小说", "裸聊", "约炮", "一夜情", "援交", "嫖娼",
    "性服务", "楼凤", "无码", "三级片", "激情视频", "人体艺术", "偷拍自拍", "强奸", "乱伦", "迷奸", "迷药", "春药",
    "六合彩", "时时彩", "百家乐", "博彩", "赌场", "老虎机", "真人娱乐", "娱乐城", "下注", "赔率", "冰毒", "摇头丸",
    "海洛因", "大麻出售", "枪支出售", "仿真枪", "弹药出售", "假钞", "假币出售", "洗钱渠道", "身份证出售",
    "银行卡出售", "人体器官买卖", "自制炸药", "porn", "xxx video", "nude pics", "sex video", "escort girls",
    "sex chat", "camgirl", "hentai", "milf", "blowjob", "gangbang", "incest", "online casino", "slot machine",
    "sports betting", "betting odds", "buy cocaine", "buy meth", "counterfeit money", "how to make a bomb",
)  # fmt: skip
